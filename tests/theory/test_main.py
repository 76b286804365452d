"""The command line of theory: its table, its files and its exit status, on a paper made up here."""

import dataclasses
import json

import numpy as np
import pytest

from jaxft.core.checks import UserError
from theory import PAPERS
from theory import __main__ as command
from theory.claims import Claim, Evidence

GOOD = Evidence(np.ones(2), np.ones(2))
BAD = Evidence(np.zeros(2), np.ones(2))
NOT_FINITE = Evidence(np.full(2, np.nan), np.ones(2))


def identity(check=GOOD, control=BAD, name="one-is-one", **options):
    return Claim(
        id=f"made_up/{name}",
        statement="One is one.",
        source="arXiv 0000.00000, section 1",
        kind="identity",
        check=lambda seed: check,
        control=lambda seed: control,
        control_breaks="one is nought",
        **options,
    )


def ordering(lesser, greater):
    """Never an exact claim: its own violation is a result, not a fault."""
    check = lambda seed: Evidence(lesser + 0.01 * seed, greater)  # noqa: E731
    control = lambda seed: Evidence(2.0 + 0.01 * seed, 1.0)  # noqa: E731
    claim = identity(name="less")
    return dataclasses.replace(claim, kind="ordering", seeds=3, max_seeds=3, check=check, control=control)


def bound(predicted, vacuous_above):
    """Measured is 0; the control exceeds every bound."""
    check = lambda seed: Evidence(0.0, predicted)  # noqa: E731
    control = lambda seed: Evidence(10.0, predicted)  # noqa: E731
    claim = identity(name="at-most", vacuous_above=vacuous_above)
    return dataclasses.replace(claim, kind="bound", check=check, control=control)


@pytest.fixture
def paper(monkeypatch):
    """Registers claims as the one paper there is."""
    monkeypatch.setattr(command, "setup_compilation_cache", lambda: None)

    def register(*claims):
        monkeypatch.setattr(command, "PAPERS", ("made_up",))
        monkeypatch.setattr(command, "claims_of", lambda slug: claims)

    return register


def test_check_prints_the_table_and_exits_0(paper, capsys):
    paper(identity())
    assert command.main(["check"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["claim", "source", "predicted", "measured", "status", "control"]
    assert row.split() == ["made_up/one-is-one", "arXiv", "0000.00000,", "section", "1", "0", "0", "holds", "violated"]


def test_noisy_measurement_is_shown_with_its_standard_error(paper, capsys):
    paper(ordering(0.0, 1.0))
    assert command.main(["check"]) == 0
    assert "0.01 ± 0.00577" in capsys.readouterr().out


def test_check_tells_what_the_control_broke(paper, capsys):
    paper(identity())
    command.main(["check"])
    assert "made_up/one-is-one: holds; control (one is nought): violated" in capsys.readouterr().err


def test_json_file_holds_the_claim_and_its_control(paper, tmp_path):
    paper(identity(), identity(name="again"))
    file = tmp_path / "findings.json"
    assert command.main(["check", "--json", str(file)]) == 0
    first, second = json.loads(file.read_text())
    assert (first["claim"]["claim"], second["claim"]["claim"]) == ("made_up/one-is-one", "made_up/again")
    assert (first["claim"]["status"], first["control"]["status"]) == ("holds", "violated")
    assert (first["claim"]["measured"], first["control"]["measured"]) == (0.0, 1.0)
    assert first["claim"]["precision"] == "float64, matmul highest"


def test_measurement_that_is_not_finite_is_null_in_the_file(paper, tmp_path):
    paper(identity(check=NOT_FINITE))
    file = tmp_path / "findings.json"
    assert command.main(["check", "--json", str(file)]) == 1
    assert json.loads(file.read_text())[0]["claim"]["measured"] is None


@pytest.mark.parametrize(
    ("claim", "status"),
    [
        (identity(), 0),
        (identity(check=BAD), 1),
        (identity(check=NOT_FINITE), 1),
        (identity(check=dataclasses.replace(GOOD, unmet=("a precondition",))), 1),
        (bound(predicted=5.0, vacuous_above=1.0), 0),
        (bound(predicted=-1.0, vacuous_above=-2.0), 1),
        (identity(control=GOOD), 1),
        (identity(control=NOT_FINITE), 1),
        (ordering(0.0, 1.0), 0),
        (ordering(2.0, 1.0), 0),
    ],
    ids=[
        *("holds", "violated", "nan", "unmet", "vacuous", "vacuous-violated"),
        *("control-holds", "control-nan", "ordering", "ordering-violated"),
    ],
)
def test_exit_status(paper, capsys, claim, status):
    paper(claim)
    assert command.main(["check"]) == status
    assert ("failed: made_up/" in capsys.readouterr().err) == bool(status)


def test_one_failing_claim_among_many_is_named_alone(paper, capsys):
    paper(identity(), identity(name="broken", check=BAD))
    assert command.main(["check", "made_up"]) == 1
    assert "failed: made_up/broken\n" in capsys.readouterr().err


def test_list_has_a_line_a_claim(paper, capsys):
    paper(identity(), ordering(0.0, 1.0))
    assert command.main(["list"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["claim", "kind", "statement"]
    assert [row.split()[:2] for row in rows] == [["made_up/one-is-one", "identity"], ["made_up/less", "ordering"]]


def test_list_of_one_paper_has_its_claims_alone(monkeypatch, capsys):
    monkeypatch.setattr(command, "PAPERS", ("made_up", "other"))
    monkeypatch.setattr(command, "claims_of", lambda slug: [identity(name=f"of-{slug}")])
    assert command.main(["list", "other"]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == ["made_up/of-other"]


def test_show_prints_a_claim_in_full(paper, capsys):
    paper(identity())
    assert command.main(["show", "made_up/one-is-one"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["statement"] == "One is one."
    assert shown["control_breaks"] == "one is nought"
    assert shown["rule"].startswith("the relative difference")
    assert command.main(["show", "one-is-one"]) == 0
    capsys.readouterr()


def test_unknown_claim_names_its_nearest(paper, capsys):
    paper(identity())
    assert command.main(["show", "made_up/one-is-won"]) == 2
    assert "unknown claim, got 'made_up/one-is-won'. Did you mean made_up/one-is-one" in capsys.readouterr().err
    assert command.main(["show", "one-is-won"]) == 2
    assert "got 'one-is-won'. Did you mean one-is-one?" in capsys.readouterr().err


def test_unknown_paper_names_its_nearest(capsys):
    assert command.main(["check", "kernel_finetune"]) == 2
    error = capsys.readouterr().err
    assert "unknown paper, got 'kernel_finetune'" in error
    assert "kernel_finetuning" in error


def test_unknown_command_exits_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["chekc"])
    assert exit_.value.code == 2
    assert "chekc" in capsys.readouterr().err


@pytest.mark.parametrize("slug", PAPERS)
def test_claims_of_a_paper_are_of_that_paper_and_named_once(slug):
    ids = [claim.id for claim in command.claims_of(slug)]
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(name.startswith(f"{slug}/") for name in ids)


def test_claims_of_an_unknown_paper_are_refused():
    with pytest.raises(UserError, match="unknown paper"):
        command.claims_of("nowhere")
