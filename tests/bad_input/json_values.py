"""Values that JSON can hold, and texts that it cannot."""

from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**64), 10**400])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "../../x", "/etc/passwd", "\x00", "\ud800", "1e400", "NaN", "a" * 3000])
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4))


@st.composite
def changed(draw, good):
    """A copy of a JSON object, at one to three places of which stands something else, nothing, or something more."""
    for _ in range(draw(st.integers(1, 3))):
        good = _changed(draw, good)
    return good


def _changed(draw, node):
    if isinstance(node, dict) and node and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(node)))
        if not draw(st.integers(0, 9)):
            return {name: value for name, value in node.items() if name != key}
        return node | {key: _changed(draw, node[key])}
    if isinstance(node, dict) and not draw(st.integers(0, 3)):
        return node | {draw(st.text(max_size=8)): draw(VALUES)}
    if isinstance(node, list) and node and draw(st.booleans()):
        index = draw(st.integers(0, len(node) - 1))
        return [*node[:index], _changed(draw, node[index]), *node[index + 1 :]]
    return draw(VALUES)
