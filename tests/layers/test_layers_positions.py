import torch

from vistok.layers.positions import sincos_grid, sincos_table, time_features


def test_a_square_grid_has_rows_and_columns():
    grid = sincos_grid(3, 3, 8)
    codes = sincos_table(torch.arange(3), 4)
    for row in range(3):
        for column in range(3):
            assert torch.equal(grid[row, column], torch.cat([codes[row], codes[column]]))


def test_other_grids_have_a_code_for_each_cell():
    grid = sincos_grid(2, 5, 8)
    assert len(grid.flatten(0, 1).unique(dim=0)) == 10
    assert torch.equal(grid[0, 2], sincos_table(torch.tensor([1, 0]), 4).flatten())


def test_times_of_odd_width_end_in_zero():
    times = torch.tensor([0.0, 0.5])
    features = time_features(times, 7)
    assert torch.equal(features[0], torch.tensor([1.0, 1, 1, 0, 0, 0, 0]))
    assert torch.equal(features[:, :6], time_features(times, 6))
    lowest = torch.tensor(500 / 256 ** (2 / 3))
    torch.testing.assert_close(features[1, [2, 5]], torch.stack([lowest.cos(), lowest.sin()]))
