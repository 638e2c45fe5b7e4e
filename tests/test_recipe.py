"""Recipes load, refuse what is wrong in one line, and survive a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.errors import UsageError
from deploykit.recipe import Recipe
from deploykit.recipe_io import apply_overrides, build_recipe, dump_recipe, load_recipe

GOOD = """\
model:
  name: shvit_s4
  weights: weights/best.safetensors
sparsify: {pattern: 2:4}
quantize:
  bits: w4a8        # weights, activations
  float_layers: ["*.head"]
calibration:
  data: images
gates:
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_text(text: str | bytes) -> Path:
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


def refused(path: Path, *args: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, *args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_loads_with_paths_beside_the_file(write: Any) -> None:
    path = write(GOOD)
    recipe = load_recipe(path)
    assert recipe.model.weights == str(path.parent / "weights/best.safetensors")
    assert recipe.calibration.data == path.parent / "images"
    assert recipe.sparsify.pattern == "2:4"  # YAML 1.1 would read the number 124
    assert recipe.gates.max_drop is None  # an empty section means its defaults


@pytest.mark.parametrize("weights", ["auto", "hub", "random"])
def test_names_are_no_paths(write: Any, weights: str) -> None:
    recipe = load_recipe(write(f"model: {{name: pkg.mod:factory, weights: {weights}}}"))
    assert (recipe.model.name, recipe.model.weights) == ("pkg.mod:factory", weights)


def test_home_and_absolute_paths(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe(
        write("model: {name: x, weights: ~/w.pt}\nevaluation: {data: /data/val}\n")
    )
    assert recipe.model.weights == "/home/someone/w.pt"
    assert recipe.evaluation.data == Path("/data/val")
    assert "no home folder" in refused(
        write("model: {name: x}\nevaluation: {data: ~nobody-here/x}")
    )


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("model: {name: x}\nquantize:\n  bit: 4\n", 3, "quantize.bit: unknown key; did you mean"),
        ("model: {name: x}\nbits: 4\n", 2, "bits: unknown key; did you mean quantize.bits?"),
        ("model: {name: x}\nzzz: 4\n", 2, "known here: version, model"),
        ("model: {name: x}\nseed: '5'\n", 2, "seed: wanted a whole number, got '5'"),
        ("model: {name: x}\nseed: true\n", 2, "seed: wanted a whole number, got true"),
        ("model: {name: x}\nseed: -1\n", 2, "seed: wanted at least 0, got -1"),
        ("model: {name: 12}\n", 1, "model.name: wanted text (put quotes around it), got 12"),
        ("model: {name: ''}\n", 1, "model.name: wanted at least 1 characters"),
        ("model: {name: x, weights: ''}\n", 1, "model.weights: wanted a path"),
        ("gates:\n  max_drop: .nan\nmodel: {name: x}\n", 2, "wanted a finite number, got nan"),
        ("model: {name: x}\nquantize: {bits: w9a9}\n", 2, "weights take 2 to 8 bits"),
        ("model: {name: x}\nquantize:\n  softmax: log-sqrt\n", 3, "did you mean log-sqrt2?"),
        ("model: {name: x}\ntargets: []\n", 2, "targets: wanted at least 1 items"),
        ("model: {name: x}\nmeasure: [1]\n", 2, "measure: wanted a mapping, got [1]"),
        ("model: {name: x}\nversion: 2\n", 2, "update deploykit"),
        ("seed: 1\n\nmodel: {}\n", 3, "model.name: missing"),
        ("seed: 1\n", 1, "model: missing"),
        ("model: {name: x, weights: random}\ngates:\n  max_drop: 1\n", 3, "needs trained weights"),
        ("model: {name: x}\ngates:\n\n  max_drop: 1\n", 4, "needs labelled images"),
        ("model: {name: x}\nverify:\n  batch_sizes: [1, 1]\n", 3, "two different sizes"),
        (
            "model: {name: x}\nmeasure:\n  min_seconds: 9\n  max_seconds: 5\n",
            4,
            "below min_seconds",
        ),
        ("model: {name: x}\n1: 2\n", 2, "wanted a name as key, got 1"),
        ("model: &m {name: x}\n", 1, "anchors and aliases"),
        ("model: {name: x}\nseed: 1\nseed: 2\n", 3, 'duplicate key "seed"'),
        ("model: !!python/object:os.system x\n", 1, "tags are refused"),
        ("model: {name: x\n", 2, "not valid YAML"),
        ("model:\n\tname: x\n", 2, "not valid YAML"),
        ("a: b\n---\nc: d\n", 2, "another document"),
        ("[" * 50_000, 1, "nested deeper"),
        ("[1, 2]\n", 1, "wanted a mapping with at least model.name, got a list"),
        ("# nothing\n", 1, "got an empty file"),
    ],
)
def test_refusals_say_where_and_how(write: Any, text: str, line: int, words: str) -> None:
    path = write(text)
    message = refused(path)
    assert message.startswith(f"{path}:{line}: ")
    assert words in message


def test_all_problems_at_once(write: Any) -> None:
    message = refused(write("model: {name: x}\nseed: a\nquantize:\n  bits: 99\n  bit: 3\n"))
    assert len(message.split("; ")) >= 3
    assert "r.yaml:2: seed" in message
    assert "r.yaml:4: quantize.bits" in message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"model: {name: \xff}", "wanted UTF-8 text, got byte 0xff"),
        (b"#" * 1_000_001, "below 1 MB"),
        (b"model: {name: x}\x01", "special characters are not allowed"),
        (b'model: {name: "a\\0b"}', "wanted plain text"),
        (b"model: {name: x}\nseed: 1" + b"0" * 5000, "not valid YAML"),
    ],
)
def test_refuses_odd_bytes(write: Any, raw: bytes, words: str) -> None:
    assert words in refused(write(raw))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "no.yaml")
    assert "Is a directory" in refused(tmp_path)


def test_options_and_overrides_lie_over_the_file(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(GOOD)
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    recipe = load_recipe(
        path, ["quantize.bits=w8a8", "evaluation.data=val"], {"model": {"weights": "mine.pt"}}
    )
    assert recipe.quantize.bits == "w8a8"
    assert recipe.quantize.float_layers == ["*.head"]  # the rest of the section stays
    assert recipe.model.weights == str(other / "mine.pt")
    assert recipe.evaluation.data == other / "val"
    assert recipe.calibration.data == tmp_path / "images"
    message = refused(path, ["quantize.bits=99"])
    assert message.startswith("command line: quantize.bits: ")
    both = refused(write("model: {name: x}\nseed: a\n"), ["quantize.edge_bits=1"])
    assert "command line: quantize.edge_bits: wanted at least 3, got 1" in both
    assert "r.yaml:2: seed" in both


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quantize.bits=4", {"quantize": {"bits": 4}}),
        ("quantize.equalize=false", {"quantize": {"equalize": False}}),
        ("quantize.norm_fold=off", {"quantize": {"norm_fold": "off"}}),
        ("quantize.compare=nncf", {"quantize": {"compare": ["nncf"]}}),
        ("gates.max_drop=0.5", {"gates": {"max_drop": 0.5}}),
        ("gates.max_drop=", {"gates": {"max_drop": None}}),
        ("sparsify.pattern=2:4", {"sparsify": {"pattern": "2:4"}}),
        ("model.name=123", {"model": {"name": "123"}}),
        ("model.name=a=b", {"model": {"name": "a=b"}}),
        ("targets=cpu-openvino", {"targets": ["cpu-openvino"]}),
        ("targets=[a, b]", {"targets": ["a", "b"]}),
        ('quantize.float_layers="*.head"', {"quantize": {"float_layers": ["*.head"]}}),
        ("model.preprocessing.size=256", {"model": {"preprocessing": {"size": 256}}}),
    ],
)
def test_override_values(override: str, expected: dict[str, Any]) -> None:
    base: dict[str, Any] = {}
    result = apply_overrides(base, [override])
    if override.startswith("quantize.bits"):
        assert str(result["quantize"]["bits"]) == "4"
    else:
        assert result == expected
    assert base == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("quantize.bit=4", "did you mean quantize.bits?"),
        ("quant.bits=4", "did you mean quantize.bits?"),
        ("bits=4", "did you mean quantize.bits?"),
        ("quantize=4", "is a section; set one of its keys: bits,"),
        ("seed.x=1", "unknown key seed.x"),
        ("nope", "wanted key=value"),
        ("=4", "wanted key=value"),
        ("gates.max_drop={a: 1}", "wanted a single value or a list"),
        ("quantize.float_layers=*.head", "put quotes"),
        ("gates.max_drop=[1", "not valid YAML"),
    ],
)
def test_override_refusals(override: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        apply_overrides({}, [override])
    assert words in str(caught.value)
    assert override in str(caught.value)


def test_build_recipe_names_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = build_recipe({"model": {"name": "x"}, "calibration": {"data": Path("a")}})
    assert recipe.calibration.data == tmp_path / "a"
    with pytest.raises(UsageError, match=r"^command line: seed: wanted a whole number"):
        build_recipe({"model": {"name": "x"}, "seed": "1"})


_text = st.text(min_size=1, max_size=20).filter(lambda t: "\0" not in t and t.isprintable())
_any_text = st.text(min_size=1, max_size=20).filter(
    lambda t: "\0" not in t and not any("\ud800" <= c <= "\udfff" for c in t)
)
_path = _text.map(lambda t: f"/data/{t}")
_recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"name": _any_text},
            optional={
                "weights": st.sampled_from(["auto", "hub"]) | _path,
                "num_classes": st.integers(1, 100_000),
            },
        )
    },
    optional={
        "quantize": st.fixed_dictionaries(
            {},
            optional={
                "bits": st.sampled_from([4, "w4a8", "W2A16", "8"]),
                "float_layers": st.lists(_any_text, max_size=3),
                "softmax": st.sampled_from(["auto", "uniform", "log-sqrt2"]),
            },
        ),
        "calibration": st.fixed_dictionaries({}, optional={"data": _path}),
        "sparsify": st.fixed_dictionaries({"pattern": st.sampled_from(["none", "2:4"])}),
        "targets": st.lists(_any_text, min_size=1, max_size=3),
        "measure": st.fixed_dictionaries({"min_seconds": st.floats(1e-6, 30)}),
        "seed": st.integers(0, 2**31 - 1),
    },
)


@settings(max_examples=40, deadline=None)
@given(data=_recipes)
def test_round_trip(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = build_recipe(data)
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    again = load_recipe(path)
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_dumped_paths_do_not_depend_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.model_validate({"model": {"name": "x"}, "evaluation": {"data": "val"}})
    assert f"data: {tmp_path}/val" in dump_recipe(recipe)
