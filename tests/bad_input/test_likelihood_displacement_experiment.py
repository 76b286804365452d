"""What a user of the likelihood displacement experiment and of its figures is told."""

import json

import pytest

from jaxft.core.checks import UserError
from jaxft.core.types import Interval
from jaxft.data.requests import conversation_corpus, request_prompts
from jaxft.lab.decoder_pretraining import DecoderPretrainingConfig, request_checkpoint
from jaxft.lab.figures_preferences import (
    draw_class_rates,
    draw_mass_flow,
    draw_percentiles,
    draw_predicted_changes,
    draw_step_predictions,
)

RUN = ["run", "likelihood_displacement", "--preset", "smoke"]
TINY = DecoderPretrainingConfig(width=8, heads=2, layers=1, steps=2, conversations=40)

CONFIGURATION = {
    "unknown key": (["--singel.steps", "3"], "single.steps"),
    "unknown loss": (["--training.loss", "sigmod"], "Did you mean sigmoid?"),
    "a loss that needs other prompts": (["--training.loss", "kto"], "training.loss: kto needs responses to other"),
    "parts of a batch that do not divide it": (["--training.accumulate", "3"], "must divide batch_size 4, got 3"),
    "no part": (["--parts"], "parts: needs at least one"),
    "a comparison of one answer": (["--single.comparisons", "no"], "must read preferred>other, got 'no'"),
    "a comparison with itself": (["--single.comparisons", "no>no"], "the two answers must differ"),
    "a similar one that is not compared": (["--single.similar", "a>b"], "similar: must be among comparisons"),
    "an unknown score": (["--percentiles.scores", "chess"], "ches"),
    "a percentile beyond 100": (["--percentiles.percentiles", "0", "101"], "must lie in [0, 100], got 101"),
    "a subset larger than its pool": (["--percentiles.size", "99"], "size: must be at most pool 24, got 99"),
    "nothing kept": (["--unalignment.keep-frac", "0"], "keep_frac: must lie in (0, 1], got 0"),
    "an unknown arm": (["--unalignment.arms", "dpoo"], "dpo"),
    "a checkpoint that is no folder": (["--checkpoint", "nowhere"], "checkpoint: nowhere is no folder"),
    "pairs for the embedded decoder": (["--data.pairs", "README.md"], "Pass --checkpoint"),
    "a file that does not exist": (["--data.pairs", "no.jsonl"], "data.pairs: no.jsonl does not exist"),
    "pairs that are not sampled, and no file": (["--unalignment.no-sampled"], "Pass --data.pairs"),
    "adapters and all parameters": (["--training.lora-rank", "4"], "Pass --single.arms blocks"),
    "a width without room for rotations": (["--pretraining.width", "6"], "pretraining.width: must be divided by"),
    "two faults at once": (["--single.steps", "0", "--training.beta", "0"], "training.beta: must be positive"),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_faulty_configuration(case, fails):
    argv, said = CONFIGURATION[case]
    assert said in fails([*RUN, *argv])


@pytest.fixture(scope="module")
def checkpoint():
    return request_checkpoint(TINY)


def test_checkpoint_without_files(fails, checkpoint):
    said = fails([*RUN, "--checkpoint", str(checkpoint)])
    assert "data.prompts: parts single of a checkpoint need it" in said
    assert "data.pairs: parts percentiles and unalignment of a checkpoint need it" in said


def test_answers_that_are_no_token(fails, checkpoint):
    argv = [*RUN, "--pretraining.width", "8", "--pretraining.heads", "2", "--pretraining.steps", "2"]
    argv += ["--pretraining.conversations", "40", "--single.comparisons", "no>of course", "--single.similar"]
    said = fails([*argv, "no>of course"])
    assert "an answer must be a token" in said
    assert "'of course' is 2 tokens" in said


def test_faulty_files_of_the_user(fails, checkpoint, tmp_path):
    prompts, pairs = tmp_path / "prompts.txt", tmp_path / "pairs.jsonl"
    prompts.write_text("is it fine ?\n")
    single = [*RUN, "--parts", "single", "--checkpoint", str(checkpoint), "--data.prompts", str(prompts)]
    assert "needs 3 prompts or more, a line each, got 1" in fails(single)
    pairs.write_text(json.dumps({"prompt": "how do i ?", "chosen": "sure"}) + "\n")
    others = [*RUN, "--parts", "percentiles", "--checkpoint", str(checkpoint), "--data.pairs", str(pairs)]
    assert f"{pairs}:1" in fails(others)


def test_folder_without_a_decoder(fails, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    said = fails([*RUN, "--parts", "single", "--checkpoint", str(tmp_path), "--data.prompts", str(prompts)])
    assert "config.json" in said


DRAWINGS = {
    "no series": (lambda: draw_percentiles([], quantity="q"), "needs at least one series"),
    "values of other percentiles": (lambda: draw_percentiles([("a", [0, 1], [[1.0]])], quantity="q"), "(1, 1) for a"),
    "no panel": (lambda: draw_mass_flow({}), "needs panels with tokens"),
    "a panel without tokens": (lambda: draw_mass_flow({"a": {}}), "needs panels with tokens, got ['a']"),
    "rows of two lengths": (lambda: draw_step_predictions({"a": ([0.0], [0.0, 1.0])}, quantity="q"), "(1,), (2,)"),
    "changes of two lengths": (
        lambda: draw_predicted_changes({"a": {"b": ([0.0], [0.0, 1.0])}}, quantities=("x", "y")),
        "each two rows of one length",
    ),
    "no class": (lambda: draw_class_rates({}, quantity="q"), "needs classes with rates"),
    "a way without seeds": (lambda: draw_class_rates({"a": {"b": []}}, quantity="q"), "needs classes with rates"),
}


@pytest.mark.parametrize("case", DRAWINGS)
def test_faulty_drawing(case):
    call, said = DRAWINGS[case]
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value)


def test_drawing_of_good_rates_is_not_refused():
    rate = Interval(0.5, 0.1, 0.4, 0.6)
    assert draw_class_rates({"a": {"b": [rate]}}, quantity="q").table["rate"] == [0.5]


CORPUS = {
    "too many requests": (lambda: request_prompts(size=1001, seed=0), "size must be in [1, 1000], got 1001"),
    "no conversation": (lambda: conversation_corpus(size=0, seed=0), "size must be at least 1, got 0"),
    "a part above one": (lambda: conversation_corpus(size=1, seed=0, refusal_frac=2), "refusal_frac must be in [0, 1]"),
}


@pytest.mark.parametrize("case", CORPUS)
def test_faulty_corpus(case):
    call, said = CORPUS[case]
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value)
