"""`fastsnn defenses`: what it lists can be typed, and gives the defense as it is by default."""

import re

import pytest
from fastsnn import __main__ as cli
from fastsnn.commands import defenses, train
from fastsnn.defenses import DEFENSES, defense_options, make_defense


def run(*arguments):
    return cli.main(["defenses", *arguments])


def test_every_defense_is_listed_with_every_option(capsys):
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[0] for line in listed] == list(DEFENSES) and all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)
    assert len(lines) - len(listed) == sum(len(defense_options(name)) for name in DEFENSES)


@pytest.mark.parametrize("name", DEFENSES)
def test_what_is_listed_can_be_typed(name):
    """Each line as it stands, pasted behind `fastsnn train`, changes nothing."""
    typed = [re.fullmatch(r"  --defense-options (\S+=\S+)", line) for line in defenses.options(name)]
    words = [match[1] for match in typed if match and "..." not in match[1]]
    plain = cli.parser().parse_args(["train", "--defense", name])
    given = cli.parser().parse_args(["train", "--defense", name, *(["--defense-options", *words] if words else [])])
    made = [make_defense(name, train.settings(arguments).of_defenses()) for arguments in (plain, given)]
    for key, value in made[0].options().items():
        assert made[1].options()[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


def test_one_of_them(capsys):
    assert run("mpd-sgr") == 0
    text = capsys.readouterr().out
    assert "Source: MPD-SGR" in text and "--eta: weight of Omega (default: 0.05)" in text
    assert run("vanilla") == 0 and "Options" not in capsys.readouterr().out
    assert run("mpd-sgd") == 1
    assert capsys.readouterr().err.startswith("fastsnn defenses: defense 'mpd-sgd' is unknown")


def test_defaults_as_they_are_typed():
    assert defenses.written("eps", 8 / 255) == "8/255" and defenses.written("weight", 0.4) == "0.4"
    assert defenses.written("attacks", ("fgsm", "rfgsm")) == "fgsm,rfgsm" and defenses.written("carry", True) == "true"
    assert defenses.sentence("One: two\nthree. Four.\n\nFive.") == "One: two three"
