"""What every part of the U-Net promises, whatever it computes, and the whole network too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import assert_gradient_everywhere
from torch import Tensor, nn
from unet_cases import CASES, MASK, Case, normal

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each
def test_shape_is_as_documented(case: Case) -> None:
    assert case.call(case.make(), case.rows(3)).shape == (3, *case.outputs)


@each
def test_gradient_reaches_every_parameter_and_every_input(case: Case) -> None:
    module, rows = case.make().double(), [row.requires_grad_() for row in case.rows(4, torch.float64)]
    y = case.call(module, rows)
    (y * normal(*y.shape, seed=9)).sum().backward()
    assert_gradient_everywhere(module, above=1e-8, **{f"input {i}": row for i, row in enumerate(rows)})


@each
def test_rows_do_not_know_of_each_other(case: Case) -> None:
    module, rows = case.make().double(), case.rows(4, torch.float64)
    together = case.call(module, rows)
    for i in range(4):
        shifted = [torch.cat((row[i : i + 1], row[:i])) for row in rows]  # row i first, and other company
        masks = torch.cat((MASK[i : i + 1], MASK[:i]))
        extra = [masks if isinstance(e, Tensor) else e for e in case.extra(4)]
        torch.testing.assert_close(module(*shifted, *extra)[0], together[i], rtol=1e-9, atol=1e-9)
    assert (together[0] != together[1]).any()


@each
def test_an_empty_batch(case: Case) -> None:
    module, rows = case.make(), [row.requires_grad_() for row in case.rows(0)]
    y = case.call(module, rows)
    assert y.shape == (0, *case.outputs)
    y.sum().backward()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@each
def test_channels_last_is_kept_and_gives_the_same(case: Case) -> None:
    module, rows = case.make(), case.rows()
    expected = case.call(module, rows)
    if expected.ndim < 4:
        return

    def check(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, y: Tensor) -> None:  # noqa: ANN401
            assert y.ndim < 4 or y.stride(1) == 1, f"channels do not come last after {name}"

        return hook

    for name, part in module.named_modules():
        part.register_forward_hook(check(name))
    module.to(memory_format=torch.channels_last)
    last = [row.contiguous(memory_format=torch.channels_last) if row.ndim == 4 else row for row in rows]
    found = case.call(module, last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.call(module, last)


@each
@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(case: Case, training: bool) -> None:
    torch.compiler.reset()
    module, rows = case.make().train(training), case.rows()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        y, expected = case.call(compiled, rows), case.call(module, rows)
    torch.testing.assert_close(y, expected)
    if training:
        found, wanted = (torch.autograd.grad(out.sum(), list(module.parameters())) for out in (y, expected))
        torch.testing.assert_close(found, wanted)


@each
def test_bfloat16_autocast(case: Case) -> None:
    module, rows = case.make(), case.rows()
    expected = case.call(module, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.call(module, rows)
    assert (y - expected).abs().max() <= 0.05 * expected.abs().max()
    y.float().square().sum().backward()
    assert_gradient_everywhere(module)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_that_of_every_tensor(case: Case, dtype: torch.dtype) -> None:
    module = case.make(dtype=dtype)
    assert {t.dtype for t in module.state_dict().values()} == {dtype}
    y = case.call(module, case.rows(2, dtype))
    assert y.dtype == dtype and y.isfinite().all()


@each
def test_is_built_on_the_meta_device(case: Case) -> None:
    before = torch.get_rng_state()
    module = case.build(device="meta")
    assert torch.equal(torch.get_rng_state(), before)
    real = case.make()
    assert all(t.is_meta for t in module.state_dict().values())
    with torch.device("meta"):
        assert all(t.is_meta for t in case.build().state_dict().values())
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(case.call(module, case.rows()), case.call(real, case.rows()))


@each
def test_is_readable(case: Case) -> None:
    module = case.make()
    assert repr(module).startswith(f"{type(module).__name__}(")
    assert "object at 0x" not in repr(module)
