"""Properties, and how many examples they are tried on."""

from functools import wraps

from hypothesis import given

from support.frameworks import affordable


def tried(many, few):
    """`given`, with the one profile of settings or the other, by what one can afford on a framework."""

    def property_of(*args, **kwargs):
        def decorate(test):
            at_length, briefly = (profile(given(*args, **kwargs)(test)) for profile in (many, few))

            @wraps(at_length)
            def on(*args, backend, **kwargs):
                affordable(backend, at_length, briefly)(*args, backend=backend, **kwargs)

            return on

        return decorate

    return property_of
