import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.weight_einsum import weight_einsum


def operands(equation, dtype, length=5):
    *inputs, output = equation.replace("->", ",").split(",")
    sizes = {"B": 2, "T": length, "N": 2 * length, "D": 6, "V": 7, "F": 4, "g": 2, "H": 3, "E": 8}
    shapes = ([sizes[letter] for letter in letters] for letters in (*inputs, output))
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("equation", ["BTD,DV->BTV", "BTHV,HVD->BTD", "BTD,DgF->BTgF", "ND,DE->NE"])
@pytest.mark.parametrize(("dtype", "result"), [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
def test_values_and_gradients_equal_those_of_einsum(equation, dtype, result):
    x, w, g = operands(equation, dtype)

    def of(einsum):
        y, derivative = jax.vjp(einsum, x, w)
        return y, *derivative(g.astype(y.dtype))

    got = of(lambda x, w: weight_einsum(equation, x, w, result))
    wanted = of(lambda x, w: jnp.einsum(equation, x, w, preferred_element_type=result))
    assert [(a.dtype, a.shape) for a in got] == [(a.dtype, a.shape) for a in wanted]
    for a, b in zip(got, wanted, strict=True):
        tolerance = 1e-6 if a.dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)


def test_the_weight_gradient_is_compiled_to_a_product_without_two_transposed_operands():
    """Of einsum it is one with two, which is slow on CPU; were it not, `weight_einsum` would be superfluous."""
    x, w, g = operands("BTD,DV->BTV", "float32", length=256)

    def transposed(einsum):
        def gradient(x, w, g):
            return jax.vjp(lambda w: einsum("BTD,DV->BTV", x, w), w)[1](g)

        text = jax.jit(gradient).lower(x, w, g).compile().as_text()
        (product,) = re.findall(r" dot\(.*lhs_contracting_dims={(\d)}, rhs_contracting_dims={(\d)}", text)
        return product == ("0", "1")

    assert transposed(jnp.einsum)
    assert not transposed(weight_einsum)
