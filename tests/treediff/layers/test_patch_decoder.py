"""The patch decoder against a loop over patches."""

import pytest
import torch

from treediff.layers import PatchDecoder


@pytest.mark.parametrize(("size", "patch"), [((8, 12), 4), ((7, 9), 3), ((5, 5), 2)])
def test_every_patch_is_painted_from_its_own_numbers_by_the_same_network(size: tuple[int, int], patch: int) -> None:
    decoder = PatchDecoder((4,), 2, size, hidden=6, width=3, patch_hidden=5, patch=patch).double()
    z = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layers = list(decoder)
    painter = next(i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.Unflatten)) + 1
    numbers = torch.nn.Sequential(*layers[:painter])(z)
    act, first, second, last = layers[painter : painter + 4]
    rows, columns = (-(-side // patch) for side in size)
    canvas = torch.zeros(2, 2, rows * patch, columns * patch, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            paint = last(second(first(act(numbers[:, i * columns + j]))))
            canvas[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = paint.view(2, 2, patch, patch)
    top, left = ((n * patch - side) // 2 for n, side in zip((rows, columns), size, strict=True))
    expected = canvas[:, :, top : top + size[0], left : left + size[1]]
    torch.testing.assert_close(decoder(z), expected)


def test_bad_widths_are_errors() -> None:
    with pytest.raises(ValueError, match="patch must be at least 1, found 0"):
        PatchDecoder((4,), 1, (8, 8), patch=0)
