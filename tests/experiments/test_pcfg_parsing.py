"""The experiment at its smallest: what it writes, and that a stopped run ends like one that was not."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.pcfg_parsing.attention import deal_within, offset_r2, within_correlation
from experiments.pcfg_parsing.config import PRESETS, PcfgParsingConfig
from experiments.pcfg_parsing.corpus import TrainingSentences, load_grammar
from experiments.pcfg_parsing.findings import findings_of
from experiments.pcfg_parsing.prepare import (
    Heldout,
    equal_rules,
    exact_marginals,
    expected_loss,
    gap_to_bayes,
    load_language,
    masked_posterior,
    prepare,
)
from jaxft.lab.config import parse_config
from jaxft.structure.enumeration import brute_force
from jaxft.structure.grammar_text import parse_grammar
from jaxft.structure.inside_outside import log_partition
from jaxft.structure.pcfg import to_dense

GRAMMAR = """
S -> N VP [0.8] | S PP [0.2]
VP -> V N [0.6] | VP PP [0.4]
PP -> P N [1.0]
N -> "dogs" [0.4] | "cats" [0.4] | "tea" [0.2]
V -> "like" [0.7] | "see" [0.3]
P -> "with" [0.5] | "near" [0.5]
"""
CHAINS = """
S -> A B [0.5] | A [0.2] | B C [0.3]
A -> B C [0.4] | B [0.6]
B -> C C [0.5] | "b" [0.5]
C -> "c" [1.0]
"""
TINY = {
    "models": "A2L1",
    "seeds": "0 1",
    "width": "8",
    "evaluation-sentences": "8",
    "corpus.max-length": "7",
    "corpus.sentences": "40",
    "training.steps": "4",
    "training.event-every": "2",
    "training.batch-size": "8",
    "probing.targets": "marginal label",
    "probing.train-sentences": "16",
    "probing.test-sentences": "12",
    "probing.max-examples": "48",
    "probing.hidden": "4",
    "probing.steps": "3",
    "probing.batch-size": "8",
}
TABLES = ("losses.csv", "probes.csv", "heads.csv")


@pytest.fixture(scope="session")
def grammar_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("grammar") / "tiny.cfg"
    path.write_text(GRAMMAR)
    return path


def flags(grammar_file: Path, **changes: str) -> list[str]:
    options = {"corpus.grammar": str(grammar_file)} | TINY | changes
    return [part for name, value in options.items() for part in (f"--{name}", *value.split())]


def command(folder: Path, grammar_file: Path, **changes: str) -> list[str]:
    return ["run", "pcfg_parsing", "--preset", "smoke", "--run-dir", str(folder), *flags(grammar_file, **changes)]


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def config(grammar_file):
    argv = ["--preset", "smoke", *flags(grammar_file)]
    return parse_config(PcfgParsingConfig, PRESETS, argv, prog="test")[0]


@pytest.fixture(scope="module")
def prepared(config):
    with jax.default_matmul_precision("highest"):
        return prepare(config, load_language(config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, grammar_file):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(folder, grammar_file)) == 0
    return folder


def test_run_writes_what_it_promises(finished):
    report = (finished / "report.md").read_text()
    for part in ("exact Bayes loss", "Findings", "Probes", "Parsers", "Attention", "peak memory", "tiny.cfg"):
        assert part in report
    kinds = [r["kind"] for r in read(finished)]
    networks, layers, targets, probes, heads = 2, 2, 2, 2, 2
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "bayes": 1,
        "parser": 5,
        "event": networks * 3,
        "probe": networks * 2 * layers * targets * probes,
        "attention": networks * 2 * heads,
        "result": networks,
    }
    for name in (
        "loss",
        "gap",
        "layers-marginal-linear",
        "layers-marginal-mlp",
        "layers-label-mlp",
        "marginals",
        "trees",
    ):
        for suffix in ("png", "pdf", "csv"):
            assert (finished / "figures" / f"{name}.{suffix}").stat().st_size > 0
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"


def test_no_loss_is_below_the_bayes_loss(finished):
    records = read(finished)
    assert min(r["gap_nats"] for r in records if r["kind"] == "event") > -1e-6
    (bayes,) = (r for r in records if r["kind"] == "bayes")
    assert 0 < bayes["bayes_loss_nats"] < bayes["wrong_loss_nats"]
    assert bayes["bayes_loss_nats"] < bayes["unigram_loss_nats"]
    found = {f.claim: f for f, _ in findings_of(records)}
    assert found["pcfg_parsing/trained_loss_above_bayes"].status == "holds"


def test_trees_of_exact_marginals_are_at_least_as_good_as_any_branching(finished):
    f1 = {r["parser"]: r["f1"] for r in read(finished) if r["kind"] == "parser"}
    assert f1["exact marginals"] > max(f1["right branching"], f1["left branching"])
    assert f1["exact marginals"] >= f1["most likely tree"] - 0.1


def test_probe_table_is_the_records(finished):
    with (finished / "probes.csv").open() as file:
        rows = list(csv.DictReader(file))
    records = [r for r in read(finished) if r["kind"] == "probe"]
    assert [row["target"] for row in rows] == [r["target"] for r in records]
    numbers = [(float(row["score"]), r["score"]) for row, r in zip(rows, records, strict=True) if row["score"] != "nan"]
    assert all(a == b for a, b in numbers if b is not None)


def test_marginals_of_a_grammar_with_unary_chains_equal_enumeration():
    """Nodes of a chain are several over one span; the span is one constituent."""
    grammar = parse_grammar(CHAINS)
    assert grammar.names is not None
    words = grammar.names.word_ids
    sentence = [words[w] for w in "cccc"]
    found = exact_marginals(grammar, np.array([sentence]), np.array([4]))[0]
    expected, nodes = np.zeros((4, 5)), 0.0
    enumeration = brute_force(grammar, sentence)
    for weight, derivation in zip(enumeration.posterior(), enumeration.derivations, strict=True):
        wide = [(i, j) for _, i, j in derivation.nodes() if j - i >= 2]
        nodes += weight * len(wide)
        for span in set(wide):
            expected[span] += weight
    assert nodes > expected.sum() + 0.1  # there are chains
    np.testing.assert_allclose(np.where(expected > 0, found, 0), expected, atol=1e-5)


def test_masked_posterior_is_the_distribution_of_the_word_given_the_others(prepared):
    """By Bayes' rule from sentence probabilities alone."""
    grammar, test = prepared.grammar, prepared.test
    tokens, lengths = test.tokens[:3], test.lengths[:3]
    mask = np.zeros(tokens.shape, bool)
    mask[:, 1] = True
    found = masked_posterior(grammar, tokens, lengths, mask)
    v = found.shape[1]
    for row, expected in enumerate(found):
        filled = np.repeat(tokens[row : row + 1], v, axis=0)
        filled[:, 1] = np.arange(v)
        log_p = log_partition(grammar, jnp.asarray(filled), jnp.full(v, lengths[row]))
        np.testing.assert_allclose(jax.nn.softmax(log_p), expected, atol=1e-5)


def test_gap_is_zero_for_the_posterior_and_positive_for_another(prepared):
    heldout = prepared.heldout
    gap, stderr = gap_to_bayes(heldout.log_bayes, heldout)
    assert (gap, stderr) == (0, 0)
    uniform = np.full_like(heldout.log_bayes, -np.log(heldout.log_bayes.shape[1]))
    gap, stderr = gap_to_bayes(uniform, heldout)
    assert gap > 3 * stderr > 0
    np.testing.assert_allclose(gap, expected_loss(heldout.log_bayes, uniform) - heldout.bayes_loss_nats, rtol=1e-5)


def test_held_out_words_stand_where_the_batch_has_the_mask(prepared):
    heldout: Heldout = prepared.heldout
    ids = np.asarray(heldout.batch.input_ids)
    assert (ids[heldout.rows, heldout.columns] == prepared.layout.mask_id).all()
    assert (ids == prepared.layout.mask_id).sum() == heldout.words
    assert len(np.unique(heldout.rows)) == len(ids)
    np.testing.assert_allclose(np.exp(heldout.log_bayes).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("sentences", ["16", "64"])  # fewer than training reads, and more
def test_sentences_of_a_step_do_not_depend_on_where_training_starts(grammar_file, prepared, sentences):
    argv = ["--preset", "smoke", *flags(grammar_file, **{"corpus.sentences": sentences})]
    config = parse_config(PcfgParsingConfig, PRESETS, argv, prog="test")[0]
    first, again = (TrainingSentences(config, prepared.tables, prepared.layout) for _ in range(2))
    first.between(0, 2)
    assert first.streamed == (int(sentences) >= 32)
    jax.tree.map(np.testing.assert_array_equal, first.between(2, 4), again.between(2, 4))
    (batch, labels), hidden = again.between(2, 4)
    assert len(hidden) == 16
    np.testing.assert_array_equal((np.asarray(labels) >= 0).sum(axis=1), hidden)
    assert (np.asarray(batch.input_ids)[np.asarray(labels) >= 0] == prepared.layout.mask_id).all()


def test_equal_rules_keep_the_support(prepared):
    dense, flat = to_dense(prepared.grammar), to_dense(equal_rules(prepared.grammar))
    there = np.isfinite(np.asarray(dense.log_rule))
    np.testing.assert_array_equal(there, np.isfinite(np.asarray(flat.log_rule)))
    of_first = np.exp(np.asarray(flat.log_rule))[0][there[0]]
    np.testing.assert_allclose(of_first, 1 / there[0].sum(), rtol=1e-6)


def test_attention_that_is_the_marginal_within_offsets_correlates_fully():
    rng = np.random.default_rng(0)
    width, target = rng.integers(2, 6, 300), rng.random(300)
    values = np.stack([target + 10 * width, 5.0 * width, rng.random(300)])
    correlation = within_correlation(values, target, width)
    np.testing.assert_allclose(correlation[:2], [1, 0], atol=1e-9)
    assert abs(correlation[2]) < 0.2
    r2 = offset_r2(values[1:], values[1:] + 3, width)
    assert r2[0] > 1 - 1e-9
    dealt = deal_within(target, width, seed=0)
    for w in range(2, 6):
        np.testing.assert_array_equal(np.sort(dealt[width == w]), np.sort(target[width == w]))
    assert abs(within_correlation(dealt[None], target, width)[0]) < 0.2


def test_presets_name_the_paper_s_networks():
    assert PRESETS["accel"].models == ("A12L12", "A12L6", "A12L3", "A12L1", "A3L12", "A24L12")
    assert PRESETS["accel"].corpus.sentences == 10_000_000
    accel = PRESETS["accel"]
    assert accel.training.steps * accel.training.batch_size <= accel.corpus.sentences
    assert not any(preset.faults() for preset in PRESETS.values())


def test_treebank_folder_gives_a_grammar(tmp_path):
    trees = "( (S (NP (DT the) (NN dog)) (VP (VBZ barks))) )\n( (S (NP (NN tea)) (VP (VBZ helps) (NP (NN us)))) )\n"
    (tmp_path / "wsj_0001.mrg").write_text(trees)
    (tmp_path / "wsj_0002.mrg").write_text("( (S (NP (DT the) (NN tea)) (VP (VBZ barks))) )\n")
    corpus = dataclasses.replace(PRESETS["smoke"].corpus, treebank=tmp_path, min_count=1, held_out=("*2.mrg",))
    source = load_grammar(corpus)
    assert "2 trees" in source.description
    assert source.grammar.names is not None
    assert "dog" in source.grammar.names.words
    assert [tree.leaves() for tree in source.held_out] == [["the", "tea", "barks"]]


@pytest.mark.slow
def test_held_out_trees_are_parsed_and_reported(tmp_path):
    shapes = ("(S (NP (DT the) (NN {})) (VP (VBZ barks)))", "(S (NP (NN {})) (VP (VBZ helps) (NP (NN us))))")
    lines = ["( " + shape.format(noun) + " )" for noun in ("dog", "tea") for shape in shapes]
    for number in range(2):
        (tmp_path / f"wsj_000{number}.mrg").write_text("\n".join(lines))
    options = {"seeds": "0", "corpus.held-out": "wsj_0001.mrg", "corpus.min-count": "1", "probing.kinds": "linear"}
    argv = [part for part in command(tmp_path / "run", tmp_path, **options) if part != "--corpus.grammar"]
    argv[argv.index(str(tmp_path))] = f"--corpus.treebank={tmp_path}"
    assert main(argv) == 0
    rows = {r["parser"]: r for r in read(tmp_path / "run") if r["kind"] == "treebank"}
    assert rows["best tree"]["labelled F1"] == rows["expected recall"]["labelled F1"] == 1
    assert rows["right branching"]["unlabelled F1"] <= 1
    assert "Of the 4 held-out trees" in (tmp_path / "run" / "report.md").read_text()


def test_finished_run_prints_its_report_and_computes_nothing(finished, grammar_file, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert main(command(finished, grammar_file)) == 0
    assert "Do masked language models parse?" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_network_that_diverges_fails_the_run(tmp_path, grammar_file, capsys):
    options = {"seeds": "0", "training.learning-rate": "1e30", "training.warmup-frac": "0"}
    assert main(command(tmp_path / "run", grammar_file, **options)) == 1
    assert "Every network diverged" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("questions", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_stopped_run_ends_bitwise_like_one_that_was_not(
    finished, grammar_file, tmp_path, stop_and_resume, same_outcome, questions
):
    folder = tmp_path / "run"
    stop_and_resume(command(folder, grammar_file), folder, questions)
    assert same_outcome(folder, finished, TABLES)


@pytest.mark.slow
@pytest.mark.parametrize("lines", [4, 20, 50])
def test_killed_run_ends_bitwise_like_one_that_was_not(
    finished, grammar_file, tmp_path, kill_and_resume, same_outcome, lines
):
    folder = tmp_path / "run"
    kill_and_resume(command(folder, grammar_file), folder, lines)
    assert same_outcome(folder, finished, TABLES)
