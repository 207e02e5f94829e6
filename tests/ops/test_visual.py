"""Grids of features: the arithmetic of papers, and transformers' own code where it has the same."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops.visual import (
    Marks,
    interpolated_positions,
    joined_scales,
    pooled,
    side_of,
    sincos_2d,
    slices_places,
    space_to_depth,
    unpad_places,
)


def grid_of(side: int) -> torch.Tensor:
    """Features that are their own row and column."""
    rows, cols = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([rows, cols], dim=2).float().flatten(0, 1).unsqueeze(0)


@given(st.integers(1, 9), st.integers(1, 3))
def test_each_square_lies_in_one_features_channels(side: int, factor: int) -> None:
    found = space_to_depth(grid_of(side) + 1, factor)
    half = -(-side // factor)
    assert found.shape == (1, half * half, 2 * factor * factor)
    for row in range(half):
        for col in range(half):
            expected = [
                [r + 1, c + 1] if r < side and c < side else [0, 0]
                for r in range(row * factor, row * factor + factor)
                for c in range(col * factor, col * factor + factor)
            ]
            assert found[0, row * half + col].view(-1, 2).tolist() == expected


def test_pooling_takes_means_of_squares() -> None:
    assert pooled(grid_of(4), 2)[0].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_no_square_is_refused() -> None:
    assert side_of(729) == 27
    with pytest.raises(ValueError, match="257 features are no square grid"):
        side_of(257)


@given(st.integers(1, 5), st.integers(1, 5))
def test_positions_of_a_grid_tell_row_and_column(rows: int, cols: int) -> None:
    table = sincos_2d(16, rows, cols).unflatten(0, (rows, cols))
    assert torch.equal(table[:, :, :8], table[:1, :, :8].expand(rows, cols, 8))  # a column, whatever the row
    assert torch.equal(table[:, :, 8:], table[:, :1, 8:].expand(rows, cols, 8))
    assert len(table.flatten(0, 1).unique(dim=0)) == rows * cols


def test_stretched_positions_are_vits() -> None:
    from transformers import ViTConfig, ViTModel

    embeddings = ViTModel(
        ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, image_size=64)
    ).embeddings
    table = torch.randn(17, 8)
    embeddings.position_embeddings.data = table.unsqueeze(0)
    theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, 7 * 5 + 1, 8), 7 * 16, 5 * 16)
    torch.testing.assert_close(interpolated_positions(table[1:], (7, 5)), theirs[0, 1:])
    assert torch.equal(interpolated_positions(table[1:], (4, 4)), table[1:])


def test_scales_are_joined_over_channels() -> None:
    """Each scale's tiles, put together and pooled, show the same place as the first scale's feature does."""
    side = 4
    whole = grid_of(2 * side).unflatten(1, (2 * side, 2 * side))
    tiles = whole.unflatten(2, (2, side)).unflatten(1, (2, side)).transpose(2, 3).flatten(1, 2).flatten(2, 3)[0]
    features = torch.cat([grid_of(side), tiles])
    found = joined_scales(features, (1, 2))
    assert found.shape == (1, side * side, 4)
    torch.testing.assert_close(found[..., 2:], 2 * found[..., :2] + 0.5)


def test_slices_lie_between_their_marks() -> None:
    marks = Marks(slice_open=100, slice_close=101, group_open=102, group_close=103, row=104)
    found = slices_places(0, 2, rows=2, cols=1, overview=True, marks=marks)
    assert found.tolist() == [100, 0, 1, 101, 102, 100, 2, 3, 101, 104, 100, 4, 5, 101, 103]
    commas = slices_places(10, 1, rows=2, cols=2, overview=True, marks=Marks(column=7, row=8))
    assert commas.tolist() == [10, 11, 7, 12, 8, 13, 7, 14]
    assert slices_places(0, 3, 1, 1, False, marks).tolist() == [100, 0, 1, 2, 101]


def test_rows_of_the_canvas_end_with_a_newline() -> None:
    places = unpad_places(0, 2, rows=1, cols=2, kept=(0, 1, 2, 2), newline=99)
    overview, canvas = places[:4], places[4:].reshape(2, 3)
    assert overview.tolist() == [0, 1, 2, 3]
    assert np.array_equal(canvas, [[5, 8, 99], [7, 10, 99]])
