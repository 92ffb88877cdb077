"""Attention against a loop that writes out the softmax, and against PyTorch's own module."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.layers.attention import Attention


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(*args: Any, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Attention:  # noqa: ANN401
    """An attention with weights and biases far from 0."""
    module = Attention(*args, dtype=dtype, **options)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + i))
    return module


def slow(module: Attention, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """The definition: token by token and head by head; who may attend to nothing has read zeros."""
    d = module.width // module.heads
    weight_k, weight_v = module.key_value.weight.chunk(2)
    bias_k, bias_v = module.key_value.bias.chunk(2)
    rows = []
    for b in range(len(x)):
        allowed = [j for j in range(context.shape[1]) if mask[b, j]]
        for i in range(x.shape[1]):
            q = module.query.weight @ x[b, i] + module.query.bias
            read = []
            for part in (slice(h * d, (h + 1) * d) for h in range(module.heads)):
                keys = [(weight_k @ context[b, j] + bias_k)[part] for j in allowed]
                values = [(weight_v @ context[b, j] + bias_v)[part] for j in allowed]
                scores = [((q[part] * k).sum() / math.sqrt(d)).exp() for k in keys]
                total = sum(scores, torch.zeros((), dtype=x.dtype))
                read.append(sum((s / total * v for s, v in zip(scores, values, strict=True)), q.new_zeros(d)))
            rows.append(module.out.weight @ torch.cat(read) + module.out.bias)
    return torch.stack(rows).view(x.shape) if rows else x.new_zeros(x.shape)


@quick
@given(st.data())
def test_equals_the_loop_in_value_and_gradient(data: st.DataObject) -> None:
    batch, asking, answering = (data.draw(st.integers(0, 3)) for _ in range(3))
    heads, d, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 10**6))
    width = data.draw(st.sampled_from([None, 1, 4]), label="context")
    module = attention(heads * d, width, heads, seed=seed)
    x = normal(batch, asking, heads * d, seed=seed).requires_grad_()
    context = x if width is None else normal(batch, answering, width, seed=seed + 1).requires_grad_()
    masked = data.draw(st.booleans())
    mask = normal(*context.shape[:2], seed=seed + 2) > 0 if masked else torch.ones(context.shape[:2]).bool()
    found = module(x, None if width is None else context, mask if masked else None)
    expected = slow(module, x, context, mask)
    torch.testing.assert_close(found, expected)
    upstream = normal(*found.shape, seed=seed + 3)
    inputs = [x, context, *module.parameters()]
    found, expected = (
        torch.autograd.grad((y * upstream).sum() + 0 * sum(i.sum() for i in inputs), inputs) for y in (found, expected)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [None, 6])
def test_equals_the_module_of_pytorch(width: int | None) -> None:
    module = attention(8, width, 2)
    other = nn.MultiheadAttention(8, 2, kdim=width, vdim=width, batch_first=True, dtype=torch.float64)
    key, value = module.key_value.weight.chunk(2)
    with torch.no_grad():
        if width is None:
            other.in_proj_weight.copy_(torch.cat((module.query.weight, key, value)))
        else:
            for theirs, mine in ((other.q_proj_weight, module.query.weight), (other.k_proj_weight, key)):
                theirs.copy_(mine)
            other.v_proj_weight.copy_(value)
        other.in_proj_bias.copy_(torch.cat((module.query.bias, module.key_value.bias)))
    other.out_proj.load_state_dict(module.out.state_dict())
    x = normal(3, 5, 8)
    context = x if width is None else normal(3, 4, width, seed=1)
    mask = torch.arange(context.shape[1]) < torch.tensor([[1], [2], [4]])
    expected, _ = other(x, context, context, key_padding_mask=~mask, need_weights=False)
    torch.testing.assert_close(module(x, None if width is None else context, mask), expected)


def nan_where_nothing_may_be_read(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, dropout_p: float
) -> Tensor:
    assert dropout_p == 0
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return scores.masked_fill(~attn_mask, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("kernel", [F.scaled_dot_product_attention, nan_where_nothing_may_be_read])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_that_may_attend_to_nothing(kernel: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    """The projection of zero and no NaN, with kernels that divide 0 by 0 there too; others do not notice."""
    module = attention(8, 6, 2, dtype=dtype)
    x, context = normal(3, 4, 8, dtype=dtype).requires_grad_(), normal(3, 5, 6, seed=1, dtype=dtype).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5, [False, True, False, True, True]])
    others = module(x[[0, 2]], context[[0, 2]], mask[[0, 2]])
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    y = module(x, context, mask)
    assert torch.equal(y[1], module.out.bias.expand(4, 8))
    tolerance = 0.5 if dtype == torch.bfloat16 else 1e-4  # kernels round differently; outputs reach 50
    torch.testing.assert_close(y[[0, 2]], others, atol=tolerance, rtol=0)
    y.square().sum().backward()
    assert x.grad is not None and context.grad is not None
    assert not x.grad[1].any() and not context.grad[1].any()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, context, *module.parameters()))


def test_no_tokens_at_all_are_like_tokens_that_may_not_be_read() -> None:
    module, x = attention(8, 6, 2), normal(2, 4, 8)
    nothing = normal(2, 0, 6)
    for mask in (None, torch.ones(2, 0, dtype=torch.bool)):
        assert torch.equal(module(x, nothing, mask), module.out.bias.expand(2, 4, 8))


def test_what_may_not_be_attended_to_does_not_matter() -> None:
    module, x, context = attention(8, 6, 2), normal(2, 4, 8), normal(2, 5, 6)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    changed = torch.where(mask[:, :, None], context, 1e3)
    expected = module(x, context, mask)
    torch.testing.assert_close(module(x, changed, mask), expected, rtol=1e-12, atol=1e-12)
    shorter = torch.cat([module(x[b, None], context[b, mask[b]][None]) for b in range(2)])
    torch.testing.assert_close(shorter, expected)


def test_the_order_of_tokens_that_answer_does_not_matter() -> None:
    module, x, context = attention(8, 6, 2), normal(2, 4, 8), normal(2, 5, 6)
    torch.testing.assert_close(module(x, context.flip(1)), module(x, context))
    itself = attention(8, heads=2)
    torch.testing.assert_close(itself(x.flip(1)), itself(x).flip(1))


def test_rows_do_not_know_of_each_other() -> None:
    module, x, context = attention(8, 6, 2), normal(4, 3, 8), normal(4, 5, 6)
    mask = normal(4, 5, seed=2) > 0
    rows = [module(x[b, None], context[b, None], mask[b, None]) for b in range(4)]
    torch.testing.assert_close(torch.cat(rows), module(x, context, mask))


def test_dropout_acts_in_training_only() -> None:
    module, x = attention(8, heads=2, dropout=0.5), normal(2, 6, 8)
    plain = attention(8, heads=2)
    torch.manual_seed(0)
    assert not torch.equal(module(x), module(x))
    mean = torch.stack([module(x) for _ in range(4000)]).mean(0)
    assert (mean - plain(x)).abs().max() < 0.2 * plain(x).abs().max()  # kept weights make up for dropped ones
    assert torch.equal(module.eval()(x), module(x))
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_compiles_in_one_graph(training: bool, masked: bool) -> None:
    torch.compiler.reset()
    module, x, context = attention(8, 6, 2).train(training), normal(2, 4, 8), normal(2, 5, 6)
    mask = normal(2, 5, seed=2) > 0 if masked else None
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, context, mask), module(x, context, mask))


def test_bfloat16_autocast() -> None:
    module, x, context = (t.float() for t in (attention(8, 6, 2), normal(2, 4, 8), normal(2, 5, 6)))
    mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    expected = module(x, context, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x, context, mask)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()


def test_is_built_on_the_meta_device() -> None:
    before = torch.get_rng_state()
    module = Attention(8, 6, 2, device="meta", dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    real = attention(8, 6, 2)
    assert all(t.is_meta and t.dtype == torch.float64 for t in module.state_dict().values())
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    x, context = normal(2, 4, 8), normal(2, 5, 6)
    assert torch.equal(module(x, context), real(x, context))


def test_is_readable() -> None:
    assert repr(Attention(8, 6, 2, 0.1)).startswith("Attention(\n  width=8, context=6, heads=2, dropout=0.1\n")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 6}, ValueError, r"heads must divide the width 6, found 4; choose one of \[1, 2, 3, 6\]"),
        ({"width": 0}, ValueError, "width must be at least 1, found 0"),
        ({"width": 8, "context": 0}, ValueError, "context must be at least 1, found 0"),
        ({"width": 8, "heads": 0}, ValueError, "heads must be at least 1, found 0"),
        ({"width": 8.0}, TypeError, "width must be a whole number, found 8.0"),
        ({"width": 8, "dropout": 1.0}, ValueError, r"dropout must be at least 0 and below 1, found 1.0"),
        ({"width": 8, "dropout": -0.1}, ValueError, r"dropout must be at least 0 and below 1, found -0.1"),
    ],
)
def test_what_cannot_be_built(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Attention(**options)


def test_inputs_that_do_not_fit() -> None:
    itself, other = Attention(8), Attention(8, 6)
    x, context = torch.zeros(2, 4, 8), torch.zeros(2, 5, 6)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(B, S, 8\), found \(2, 4, 7\)"):
        itself(x[:, :, :7])
    with pytest.raises(ValueError, match=r"expected tokens of shape \(B, S, 8\), found \(4, 8\)"):
        itself(x[0])
    with pytest.raises(ValueError, match="was built for self-attention; build it with context= to read another"):
        itself(x, x)
    with pytest.raises(ValueError, match=r"reads a context of shape \(B, T, 6\), found none"):
        other(x)
    for wrong in (context[:1], context[0], context[:, :, :5]):
        with pytest.raises(ValueError, match=r"expected a context of shape \(2, T, 6\), found \("):
            other(x, wrong)
    with pytest.raises(TypeError, match=r"boolean mask, True = may be attended to, found torch.float32"):
        other(x, context, torch.ones(2, 5))
    for shape in ((2, 4), (5,), (1, 5), (2, 1, 5)):
        with pytest.raises(ValueError, match=r"expected a mask of shape \(2, 5\), found \("):
            other(x, context, torch.ones(shape, dtype=torch.bool))
