"""Settings: TOML under flags, everything unknown refused with its name, and what is written reads back equal."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from finetune import config, settings, toml
from finetune.errors import Fault


@dataclass(frozen=True)
class Config:
    """Groups that recipes use, and settings of its own outside them."""

    output: settings.Output
    data: settings.Data = field(default_factory=settings.Data)
    model: settings.Model = field(default_factory=settings.Model)
    prior: settings.Prior = field(default_factory=settings.Prior)
    adapter: settings.Adapter = field(default_factory=settings.Adapter)
    optim: settings.Optim = field(default_factory=lambda: settings.Optim(lr=3e-4))
    train: settings.Train = field(default_factory=settings.Train)
    samples: settings.Samples = field(default_factory=settings.Samples)
    depth: int = 3
    """How deep. Not deeper."""
    sizes: tuple[int, int] = (1, 2)
    mode: Literal["a", "b"] | None = None


GROUPS = [value for value in vars(settings).values() if dataclasses.is_dataclass(value)]


def parse(tmp_path: Path, text: str, *flags: str) -> Config:
    file = tmp_path / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return config.parse(Config, ["--config", str(file), *flags], "finetune train page")


def test_flags_win_over_toml_and_toml_over_defaults(tmp_path: Path) -> None:
    text = '[data]\ndata = "pictures"\n[output]\noutput = "run"\n[adapter]\nrank = 8\nalpha = 4\n'
    made = parse(tmp_path, text, "--rank", "2", "--no-prior")
    assert made.data == settings.Data("pictures")
    assert (made.adapter.rank, made.adapter.alpha, made.adapter.dropout) == (2, 4.0, 0.0)
    assert type(made.adapter.alpha) is float
    assert made.optim.lr == 3e-4, "the recipe's own default of a group"
    assert not made.prior.prior
    assert type(made) is Config


def test_a_table_keeps_the_recipes_own_defaults_beside_it(tmp_path: Path) -> None:
    made = parse(tmp_path, "[optim]\nwarmup = 10\n", "--data", "d", "--output", "o")
    assert (made.optim.lr, made.optim.warmup) == (3e-4, 10)


def test_with_prior_is_another_name(tmp_path: Path) -> None:
    assert parse(tmp_path, "[prior]\nprior = false\n", "--data", "d", "--output", "o", "--with-prior").prior.prior


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    text = (
        'rank = 4\n[adapter]\nrnk = 8\nalpha = "8"\n[optm]\nlr = 1.0\n[train]\nseed = 1.5\nlr = 1\nprecision = "bf32"\n'
    )
    with pytest.raises(Fault) as caught:
        parse(tmp_path, text)
    assert str(tmp_path / "settings.toml") in caught.value.message
    assert caught.value.details == [
        "line 1: rank: no such setting outside the tables. It belongs in [adapter].",
        "line 3: rnk: no such setting in [adapter]. Did you mean rank?",
        'line 4: alpha = "8": expected a number.',
        "line 5: optm: no such setting outside the tables. Did you mean optim?",
        "line 8: seed = 1.5: expected a whole number.",
        "line 9: lr: no such setting in [train]. It belongs in [optim].",
        'line 10: precision = "bf32": expected one of "fp32", "bf16", "fp16".',
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nsteps = true", "steps = true: expected a whole number."),
        ("[data]\nstrict = 1", "strict = 1: expected true or false."),
        ("[data]\nskip = 3", "skip = 3: expected a list, each item text in quotes."),
        ("[data]\ndata = 3", "data = 3: expected text in quotes."),
        ("[data]\nmasks = 3", "masks = 3: expected a path in quotes."),
        ("sizes = [1]", "sizes = [1]: expected a list of 2: a whole number, a whole number."),
        ("mode = 3", 'mode = 3: expected one of "a", "b".'),
        ("train = 5", "train is a group of settings: write [train] and its settings below."),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(Fault) as caught:
        parse(tmp_path, text)
    assert [detail.partition(": ")[2] for detail in caught.value.details] == [said]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train\n", "not valid TOML"),
        ('recipe = "lara"', "no such recipe. Did you mean lora?"),
        ("recipe = 3", "no such"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(Fault, match=said):
        parse(tmp_path, text)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes('model = "caf\xe9"'.encode("latin-1"))
    with pytest.raises(Fault, match="not UTF-8 text at byte 12"):
        config.parse(Config, ["--config", str(tmp_path / "latin.toml")], "finetune")


def test_a_byte_order_mark_is_no_setting(tmp_path: Path) -> None:
    assert parse(tmp_path, "\ufeffdepth = 5\n", "--data", "d", "--output", "o").depth == 5


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"gone\.toml: no such file"):
        config.parse(Config, [f"--config={tmp_path / 'gone.toml'}"], "finetune")


@pytest.mark.parametrize(
    "words", [["--config", "a.toml", "--config=b.toml"], ["--skip", "a", "--seed", "1", "--skip", "b"]]
)
def test_a_flag_that_is_given_twice_is_refused(words: list[str]) -> None:
    with pytest.raises(Fault, match=f"^{words[0]}: given more than once"):
        config.parse(Config, words, "finetune")


def test_several_values_follow_one_flag() -> None:
    made = config.parse(Config, ["--data", "d", "--skip", "a.jpg", "b c.jpg", "--output", "o"], "finetune")
    assert made.data.skip == ("a.jpg", "b c.jpg")


def test_what_is_required_may_come_from_either_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(tmp_path, '[data]\ndata = "d"\n')
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--output PATH" in said and "--data" not in said
    assert parse(tmp_path, '[output]\noutput = "run"\n', "--data", "d").output.output == Path("run")


def test_settings_of_one_recipe_are_not_taken_by_another(tmp_path: Path) -> None:
    from finetune.recipes import dreambooth

    (tmp_path / "a.toml").write_text('recipe = "lora"\n[data]\ndata = "d"\n[output]\noutput = "o"\n')
    with pytest.raises(Fault, match="made for the recipe lora, not for dreambooth"):
        config.parse(dreambooth.Config, ["--config", str(tmp_path / "a.toml")], "finetune train dreambooth")
    assert config.recipe_of(tmp_path / "a.toml") == "lora"


def test_the_written_settings_explain_themselves() -> None:
    text = config.dumps(Config(settings.Output(Path("o")), settings.Data("d")))
    assert "\nrank = 16  # Rank of the thin matrices\n" in text
    assert text.startswith("depth = 3  # How deep\n")
    assert "revision" not in text, "None is left out"


def test_plain_values_are_what_json_holds() -> None:
    plain = config.asdict(Config(settings.Output(Path("o")), settings.Data("d", skip=("a", "b"))))
    assert (plain["data"]["data"], plain["data"]["skip"], plain["data"]["prompt"]) == ("d", ["a", "b"], None)


CONCEPTS = """
[data]
trigger = "sks"
[[concepts]]
data = "dogs"
weight = 2
class_prompt = "a dog"
[output]
output = "run"
[[concepts]]
data = "vases"
trigger = "vzs"
"""


def test_a_list_of_tables_is_read_and_written(tmp_path: Path) -> None:
    made = parse(tmp_path, CONCEPTS, "--prompt", "a photo")
    first, second = made.data.concepts
    assert first == settings.Concept("dogs", weight=2.0, class_prompt=("a dog",))
    assert second == settings.Concept("vases", trigger="vzs")
    assert (made.data.trigger, made.data.prompt, made.output.output) == ("sks", "a photo", Path("run"))
    text = config.dumps(made)
    assert text.count("[[concepts]]") == 2 and "\nconcepts =" not in text
    assert parse(tmp_path, text) == made
    assert config.asdict(made)["data"]["concepts"][1]["data"] == "vases"


def test_all_that_is_wrong_with_a_list_of_tables_is_said_with_its_lines(tmp_path: Path) -> None:
    text = CONCEPTS + 'wieght = 3\nflip = true\nrepeats = "2"\n[[concepts]]\nprompt = "x"\n[train]\nrepeats = 2\n'
    with pytest.raises(Fault) as caught:
        parse(tmp_path, text)
    assert caught.value.details == [
        "line 13: wieght: no such setting in [[concepts]]. Did you mean weight?",
        "line 14: flip: no such setting in [[concepts]]. There is: alpha_masks, class_data, class_prompt, data, masks, "
        "prompt, repeats, sources, template, trigger, validation, weight.",
        'line 15: repeats = "2": expected a whole number.',
        "line 16: [[concepts]] number 3 lacks data.",
        "line 19: repeats: no such setting in [train]. It belongs in [[concepts]].",
    ]


@pytest.mark.parametrize(
    "text", ['concepts = "dogs"', "concepts = [1]", '[concepts]\ndata = "dogs"', '[data]\nconcepts = "dogs"',
             '[[data.concepts]]\ndata = "dogs"'],
)  # fmt: skip
def test_a_list_of_tables_has_one_form(tmp_path: Path, text: str) -> None:
    with pytest.raises(Fault) as caught:
        parse(tmp_path, text)
    assert any("rite [[concepts]]" in detail for detail in caught.value.details)


def test_one_value_is_a_list_of_one(tmp_path: Path) -> None:
    made = parse(tmp_path, '[data]\nskip = "a.jpg"\n', "--output", "o")
    assert made.data.skip == ("a.jpg",)
    assert toml.convert(512, tuple[int, ...]) == (512,)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_what_may_be_none_is_none_by_default(group: type) -> None:
    """Written settings leave None out, so it must be what their absence means."""
    hints = typing.get_type_hints(group)
    for one in dataclasses.fields(group):
        if type(None) in typing.get_args(hints[one.name]):
            assert one.default is None, f"{group.__name__}.{one.name}"


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a setting's type; text without lone surrogates, which no text file can hold."""
    text = st.text(st.characters(exclude_categories=["Cs"]))
    plain = {str: text, int: st.integers(), float: st.floats(allow_nan=False), bool: st.booleans()}
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if hint is Path:
        return text.map(Path)
    if origin is Literal:
        return st.sampled_from(arms)
    if origin is types.UnionType or origin is typing.Union:
        return st.one_of(*map(values, arms))
    if origin is tuple and arms[1:] == (...,):
        return st.lists(values(arms[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arms))
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{name: values(inner) for name, inner in hints.items()})
    return st.none() if hint is type(None) else plain[hint]


@hypothesis(deadline=None, max_examples=30)  # each of them is of all settings
@given(made=values(Config))
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, made: Config) -> None:
    file = tmp_path_factory.getbasetemp() / "written.toml"
    file.write_text(config.dumps(made), encoding="utf-8")
    assert config.parse(Config, ["--config", str(file)], "finetune") == made


def test_a_number_beyond_all_floats_is_refused() -> None:
    with pytest.raises(toml.Mismatch):
        toml.convert(10**400, float)


@hypothesis(deadline=None)
@given(number=st.integers())
def test_numbers_are_not_text_and_text_no_numbers(number: int) -> None:
    assert toml.convert(number, float) == float(number)
    for value, hint in [
        (str(number), int),
        (str(number), float),
        (number, str),
        (number, bool),
        (float(number % 9), int),
    ]:
        with pytest.raises(toml.Mismatch):
            toml.convert(value, hint)
