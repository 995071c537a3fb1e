import pytest

from vistok.decoding import Schedule
from vistok.errors import UserError


@pytest.mark.parametrize(
    ("spelling", "start", "middle", "end"),
    [
        (3.0, 3, 3, 3),
        ("constant(3)", 3, 3, 3),
        ("linear(50, 5)", 50, 27.5, 5),
        ("cosine(50,5)", 50, 27.5, 5),
        ("power_cosine(1,4,1)", 1, 2.5, 4),
        ("two_stage(50,5)", 50, 5, 5),
        ("interval(3,0.25,0.75)", 1, 3, 1),
    ],
)
def test_values_and_spelling(spelling, start, middle, end):
    schedule = Schedule(spelling)
    assert [schedule(f) for f in (0.0, 0.5, 1.0)] == pytest.approx([start, middle, end])
    assert Schedule(str(schedule)) == schedule


def test_power_delays_the_rise():
    assert Schedule("power_cosine(1,4,3)")(0.5) < Schedule("power_cosine(1,4,1)")(0.5)


@pytest.mark.parametrize("spelling", ["liner(1,2)", "linear(1)", "linear(a,b)", "", "linear(1,2"])
def test_wrong_spellings_are_refused(spelling):
    with pytest.raises(UserError, match="schedule"):
        Schedule(spelling)


def test_the_nearest_form_is_named():
    with pytest.raises(UserError, match="did you mean 'linear'"):
        Schedule("liner(1,2)")
