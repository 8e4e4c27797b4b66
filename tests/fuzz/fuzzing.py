"""What the fuzz tests draw from: values in the wrong place, damaged bytes, and the same cases each time."""

import contextlib
import copy
import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def cases(number):
    """The same cases in every run."""
    checks = list(HealthCheck)
    return settings(max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


#: What a person, a damaged disk or another program may have written in the place of a value.
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 2**31, 10**400, -(10**20), 0.5, -0.5, 1e300, math.inf, math.nan])
    | st.sampled_from(["", " ", "none", "auto", "true", "1e-3", "1e999", "9" * 400, "../..", "/", "\x00", "\ud7ff"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
CHOICE = st.integers(0, 2**16)


def mangle(content, changes):
    """A copy of nested content in which each change (a number that picks the place, a value) was made."""
    content = copy.deepcopy(content)
    for number, value in changes:
        places = list(places_in(content))
        if places:
            container, key = places[number % len(places)]
            if value is KeyError:
                del container[key]
            else:
                container[key] = value
    return content


def places_in(content):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, child in list(items):
        yield content, key
        yield from places_in(child)


CHANGES = st.lists(st.tuples(CHOICE, VALUES | st.just(KeyError)), min_size=1, max_size=2)
#: A damage to bytes: cut at, or written over.
DAMAGE = st.tuples(CHOICE, st.none() | st.binary(min_size=1, max_size=6))


def damage(content: bytes, change) -> bytes:
    place, new = change
    place %= max(1, len(content))
    return content[:place] if new is None else content[:place] + new + content[place + len(new) :]


@contextlib.contextmanager
def one_sentence(*errors):
    """Lets these errors pass, with their one sentence."""
    try:
        yield
    except errors as error:
        message = " ".join(str(error).split())
        if not message:
            raise AssertionError("an error without a word") from error
