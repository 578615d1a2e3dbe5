"""`Backend.xp`: what the library uses of it, and whether the laws notice what is missing or wrong."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

import hypergrad
from hypergrad import testing
from hypergrad.backend import Backend, get_backend
from hypergrad.backend.protocol import NAMESPACE
from hypergrad.testing import namespace_laws, tree_laws
from hypergrad.testing.namespace_laws import EXAMPLES

NUMPY = get_backend("numpy")


def used(source):
    """The names that a program reads from ``xp``, ``….xp`` or their ``linalg``."""
    names = set()

    def name(node):
        """What an expression is called inside of ``xp``: "" for ``xp`` itself, ``None`` for anything else."""
        if isinstance(node, ast.Name):
            return "" if node.id == "xp" else None
        if not isinstance(node, ast.Attribute):
            return None
        if node.attr == "xp":
            return ""
        owner = name(node.value)
        return None if owner is None else f"{owner}.{node.attr}".lstrip(".")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(name(node))
    return names - {None, "", "linalg"}


def test_the_scan_sees_every_spelling():
    source = """
total = xp.sum(backend.xp.exp(x))
where, (u, s, _) = self.backend.xp.where, xp.linalg.svd(x)
self.xp = other.linalg.qr(x.shape)
"""
    assert used(source) == {"sum", "exp", "where", "linalg.svd"}


def test_the_names_are_those_that_the_library_uses():
    root = Path(hypergrad.__file__).parent
    files = [path for path in root.rglob("*.py") if path.name != Path(namespace_laws.__file__).name]
    assert len(files) > 50
    names = set().union(*(used(path.read_text(encoding="utf-8")) for path in files))
    assert names == set(NAMESPACE) and len(NAMESPACE) == len(names)


def test_every_name_has_an_example():
    assert list(EXAMPLES) == list(NAMESPACE)


class Broken(Backend):
    """The NumPy backend, of which a test replaces a part."""

    name = "broken"

    def __init__(self, **parts):
        self.xp = SimpleNamespace(**vars(NUMPY.xp))
        vars(self).update(parts)

    owns, readable, asarray = NUMPY.owns, NUMPY.readable, NUMPY.asarray
    to_numpy, detach, vjp = NUMPY.to_numpy, NUMPY.detach, NUMPY.vjp


def broken(law, backend):
    """Does the law notice?"""
    try:
        law(backend)
    except (AssertionError, AttributeError):
        return True
    return False


def test_the_broken_backend_is_sound_before_it_is_broken():
    assert not any(broken(law, Broken()) for law in namespace_laws.NAMESPACE_LAWS)


@pytest.mark.parametrize("name", NAMESPACE)
def test_a_missing_function_is_named(name):
    backend = Broken()
    owner, _, attribute = name.rpartition(".")
    if owner:
        setattr(backend.xp, owner, SimpleNamespace(**vars(getattr(backend.xp, owner))))
    delattr(getattr(backend.xp, owner) if owner else backend.xp, attribute)
    with pytest.raises(AssertionError, match=rf"lacks {name}$"):
        namespace_laws.namespaces_are_complete(backend)


@pytest.mark.parametrize("name", [name for name in NAMESPACE if name != "finfo" and "linalg" not in name])
def test_a_function_with_other_values_is_noticed(name):
    backend = Broken()
    right = getattr(backend.xp, name)
    setattr(backend.xp, name, lambda *args, **kwargs: 1.0 * right(*args, **kwargs) + 1e-3)
    assert broken(namespace_laws.functions_do_what_their_names_say, backend)


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.differentiable])
def test_a_function_without_its_derivative_is_noticed(name):
    backend = Broken()
    right = getattr(backend.xp, name)
    setattr(
        backend.xp,
        name,
        lambda *args, **kwargs: right(*NUMPY.detach(args), **kwargs) + 0.0 * NUMPY.inner(args[-1], args[-1]),
    )
    assert broken(namespace_laws.functions_have_derivatives, backend)


def test_a_vector_that_keeps_one_dtype_is_noticed():
    backend = Broken()
    backend.ravel = lambda tree: (
        NUMPY.ravel(tree)[0],
        lambda flat: NUMPY.map(lambda x: x.astype("float64"), NUMPY.ravel(tree)[1](flat)),
    )
    assert not broken(tree_laws.vectors_give_leaves_their_dtype, Broken())
    assert broken(tree_laws.vectors_give_leaves_their_dtype, backend)


def test_laws_have_names_of_their_own():
    names = [law.__name__ for law in testing.BACKEND_LAWS]
    assert len(set(names)) == len(names) and all(law.__doc__ for law in testing.BACKEND_LAWS)
