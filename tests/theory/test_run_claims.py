"""Claims on the records of a run: judged key by key beside their control, and shown with it."""

from jaxft.core.findings import Finding
from theory.claims import Kind, check_claim
from theory.run_claims import CONTROLLED_COLUMNS, compared, controlled_rows, judge_run, run_claim

LOSSES = {"a": (0.9, 0.5), "b": (0.8, 0.3), "c": (0.7, 0.3)}


def falls(losses=LOSSES, kind: Kind = "ordering", **options):
    keys = [{"net": net} for net in losses]
    return run_claim(
        "paper/loss_falls",
        "Training lowers the loss.",
        kind,
        keys,
        lambda key: compared("loss: before, after", *losses[key["net"]]),
        lambda key: compared("", *reversed(losses[key["net"]])),
        "before is before (here: after)",
        source="a paper",
        **options,
    )


def test_every_key_is_a_piece_of_evidence_as_a_seed_is():
    claim = falls().claim
    ((finding, control),) = judge_run([falls()])
    assert (finding, control) == (check_claim(claim), check_claim(claim, control=True))
    assert (finding.status, control.status) == ("holds", "violated")
    assert finding.setting["seeds"] == len(LOSSES)


def test_claim_on_nothing_that_the_run_recorded_is_left_out():
    assert judge_run([falls({})]) == []
    assert [finding.claim for finding, _ in judge_run([falls({}), falls()])] == ["paper/loss_falls"]


def test_loss_that_was_not_finite_is_no_evidence():
    ((finding, _),) = judge_run([falls(LOSSES | {"d": (None, 0.3)})])
    assert finding.status == "inconclusive"


def test_tolerance_is_that_of_the_claim():
    close = {"a": (1.0, 1.00005)}
    statuses = [judge_run([falls(close, "identity", tolerance=t)])[0][0].status for t in (1e-4, 1e-5)]
    assert statuses == ["holds", "violated"]


def test_table_has_the_quantity_and_the_control_beside_each_finding():
    finding = Finding("paper/x", 2.0, 1.0, 0.0, 0.0, "holds", {"quantity": "greater, lesser"})
    control = Finding("paper/x", 1.0, 2.0, 0.0, 0.0, "violated")
    (row,) = controlled_rows([(finding, control)])
    cells = ("x", "greater, lesser", 2.0, "1", "holds", "violated")
    assert row == dict(zip(CONTROLLED_COLUMNS, cells, strict=True))
