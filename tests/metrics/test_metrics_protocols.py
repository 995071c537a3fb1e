"""Results carry their protocol and refuse to compare across protocols."""

import json
from dataclasses import replace

import pytest

from vistok.errors import UserError
from vistok.metrics import Protocol, Result, compare, find_result, read_results, write_result

PROTOCOL = Protocol(
    task="generation",
    count=1000,
    pictures="sampled, 32 x 32",
    labels="balanced",
    reference="emoji (train), 3576 pictures, resize-center-crop at 32 px",
    features="random-inception",
    estimators="k = 3",
)


def test_results_share_a_file(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    first = Result({"fid": 12.5, "recall": 0.25}, PROTOCOL, {"seed": 0}, ["biased"])
    second = Result({"fid": 10.0}, replace(PROTOCOL, count=2000))
    assert read_results(path) == {}
    write_result(path, "small", first)
    write_result(path, "large", second)
    write_result(path, "small", first)
    assert read_results(path) == {"small": first, "large": second}
    record = json.loads(path.read_text())["small"]
    assert record["protocol"]["rounding"] == "nearest of 256 levels"
    assert set(record["versions"]) >= {"vistok", "torch", "torch-fidelity"}
    assert [f.name for f in path.parent.iterdir()] == ["metrics.json"]


def test_results_of_one_protocol_compare():
    before, after = Result({"fid": 12.5, "kid": 1.0}, PROTOCOL), Result({"fid": 10.0}, PROTOCOL)
    assert compare(before, after) == {"fid": -2.5}
    table = after.table(compare(before, after))
    assert "(-2.5)" in table
    assert PROTOCOL.reference in table


def test_results_of_different_protocols_do_not():
    other = replace(PROTOCOL, count=50_000, features="inception")
    with pytest.raises(UserError) as error:
        compare(Result({"fid": 1.0}, PROTOCOL), Result({"fid": 1.0}, other))
    assert "count (1000 against 50000)" in str(error.value)
    assert "features ('random-inception' against 'inception')" in str(error.value)
    assert "reference" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"scores": {}, "protocl": {}}}'])
def test_files_of_something_else_are_refused(content, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a file of scores"):
        write_result(path, "new", Result({}, PROTOCOL))
    assert path.read_text() == content


def test_an_unknown_result_is_named():
    results = {"generation": Result({}, PROTOCOL)}
    with pytest.raises(UserError, match=r"m\.json: no result 'genration'.*did you mean"):
        find_result(results, "genration", "m.json")
