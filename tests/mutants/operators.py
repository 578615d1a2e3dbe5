"""The one mutation that cosmic-ray lacks: a statement that is not executed."""

from cosmic_ray import plugins
from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Keyword

NOT_CODE = {
    "import_name",
    "import_from",
    "string",
    "strings",
    "keyword",
    "operator",
    "global_stmt",
    "nonlocal_stmt",
}


class RemoveStatement(Operator):
    """``self.sync()`` becomes ``pass``."""

    def mutation_positions(self, node):
        if node.type == "simple_stmt" and node.children[0].type not in NOT_CODE:
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node, index):
        first = node.get_first_leaf()
        node.children[0] = Keyword("pass", first.start_pos, first.prefix)
        return node

    @classmethod
    def examples(cls):
        return (Example("x = 1\n", "pass\n"),)


def register() -> None:
    """Make the mutation known to cosmic-ray, in this process."""
    plugins.OPERATOR_PROVIDERS["hypergrad"] = {RemoveStatement.__name__: RemoveStatement}
