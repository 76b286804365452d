"""Part unalignment: a decoder that refuses is tuned on preferences between its own responses, and asked again.

Most pairs are two refusals, of which one is preferred. Does tuning on them make the decoder comply?
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.likelihood_displacement.config import Arm, LikelihoodDisplacementConfig, Unalignment
from experiments.likelihood_displacement.prepare import Loaded, Model, Pairs, as_pairs, request_ids
from experiments.likelihood_displacement.tuners import Method, Phase, Tuned, make_trainer, method_of, run_phase
from jaxft.core.checks import require
from jaxft.core.rng import host_stream, stream
from jaxft.core.types import Params
from jaxft.data.batching import batch_indices
from jaxft.data.causal_rows import causal_tokens
from jaxft.evaluation.response_classes import ResponseClass, class_rates, classify_responses, compare_rates
from jaxft.lab.resumable import Resumable
from jaxft.nn.generation import generate
from jaxft.tuning.ches import ches_scores
from jaxft.tuning.encoding import EncodedPreferences, PairNotes
from jaxft.tuning.objectives import PreferenceLabels
from jaxft.tuning.packing import BatchShape, batch_shape
from jaxft.tuning.reference import reference_log_probs
from jaxft.tuning.selection import filter_by_score

SETS = ("tuned on", "held out")
FEWEST_PAIRS = 2


class Plan(NamedTuple):
    """One run of this part."""

    phase: Phase
    seed: int
    arm: Arm


def unalignment_plans(part: Unalignment, base: int) -> list[Plan]:
    """All runs of this part, in order."""
    plans = []
    for seed in part.seeds:
        for arm in part.arms:
            first = base + len(plans) * (part.steps + 1)
            key = {"part": "unalignment", "seed": seed, "arm": arm}
            plans.append(Plan(Phase(first, part.steps, key), seed, arm))
    return plans


def run_unalignment(
    config: LikelihoodDisplacementConfig, context: Resumable, loaded: Loaded, tuned: Tuned, plans: list[Plan]
) -> Iterator[tuple[Plan, bool]]:
    """Runs what an earlier start has not done; each run with whether it came to an end."""
    of_seed = functools.cache(lambda seed: _Seed(config, context, loaded, tuned, seed))
    for plan in plans:
        key = plan.phase.key
        if not (context.recorded("result", key) or context.recorded("diverged", key)):
            of_seed(plan.seed).run(plan)
        yield plan, context.recorded("result", key)


class Look(NamedTuple):
    """What a decoder says when it is asked."""

    labels: dict[str, list[str]]
    """Class of the response to each prompt, by set of prompts."""
    first_tokens: Float[np.ndarray, "v"]
    """Probability of every token as the first of a response, mean over the prompts that are tuned on."""
    log_probs: Float[np.ndarray, "n 2"]
    """Of the responses of the pairs."""


class _Seed:
    """Prompts, pairs and the untuned decoder's answers, of one seed."""

    def __init__(
        self, config: LikelihoodDisplacementConfig, context: Resumable, loaded: Loaded, tuned: Tuned, seed: int
    ):
        self.config, self.context, self.tuned, self.seed = config, context, tuned, seed
        part = config.unalignment
        self.classes = [
            ResponseClass("refusal", prefixes=part.refusals),
            ResponseClass("compliance", prefixes=part.compliances),
        ]
        prompts, trained = request_ids(config, loaded, seed=seed)
        self.prompts = dict(zip(SETS, (prompts[:trained], prompts[trained:]), strict=True))
        self.width = max(map(len, prompts))
        if part.sampled or loaded.pairs is None:
            self.pairs = self._sampled_pairs()
        else:
            wanted = {tuple(ids) for ids in self.prompts[SETS[0]]}
            rows = [i for i, ids in enumerate(loaded.pairs.prompts) if tuple(ids) in wanted]
            chosen = loaded.pairs.select(rows)
            if part.refusals_alone:
                chosen = chosen.select(np.flatnonzero(self._both_refuse(chosen)))
            self.pairs = as_pairs(chosen, batch_shape(chosen))
        self.before = self.look(tuned.start)

    def run(self, plan: Plan) -> None:
        """Tunes by one arm, and asks again."""
        config, context, key = self.config, self.context, {"part": "unalignment", "seed": self.seed}
        if not context.recorded("start", key):
            context.record(plan.phase.base, "start", **key, **self._described())
            context.run.save_arrays(f"unalignment-{self.seed}", first_tokens=self.before.first_tokens)
        rows = self._rows(plan.arm)
        part, n = config.unalignment, len(self.pairs.lengths)
        index = batch_indices(
            len(rows), config.training.batch_size, seed=self.seed, name="unalignment", stop=part.steps
        )
        # As many rows whatever was dropped, so that all seeds share a program; the further ones are never drawn.
        filled = np.resize(np.arange(n), max(n, len(self.prompts[SETS[0]])))
        examples = self.pairs.rows(filled)
        labels = PreferenceLabels(jnp.asarray(self.before.log_probs[filled]), jnp.asarray(examples.lengths))
        trainer = make_trainer(self.tuned, self._method(plan.arm), context.mesh)
        trained = run_phase(context, plan.phase, trainer, self.tuned.start, examples.batch, labels, rows[index])
        if trained is not None:
            after = self.look(trained)
            fields = self._compared(after, rows)
            context.run.save_arrays(f"unalignment-{self.seed}-{plan.arm}", first_tokens=after.first_tokens)
            context.record(plan.phase.end, "result", **plan.phase.key, pairs=len(rows), **fields)

    def look(self, trained: Params) -> Look:
        """Samples a response to every prompt, the same random numbers each time, and scores the pairs."""
        model, size = self.tuned.model, self.config.evaluation_batch
        whole = self.tuned.whole(trained)
        key = stream(jax.random.key(self.seed), "answers")
        labels = {name: self._labels(self._answers(whole, self.prompts[name], stream(key, name))) for name in SETS}
        log_probs = reference_log_probs(
            model.log_probs, whole, self.pairs.batch, batch_size=size, mesh=self.context.mesh
        )
        first = jax.jit(lambda p, batch: jax.nn.softmax(model.first_logits(p, batch)))
        n = len(self.pairs.lengths)
        blocks = [np.minimum(np.arange(i, i + size), n - 1) for i in range(0, n, size)]
        rows = np.concatenate([np.asarray(first(whole, self.pairs.rows(at).batch)) for at in blocks])[:n]
        return Look(labels, rows.astype(np.float64).mean(axis=0), np.asarray(log_probs))

    def _answers(self, whole: Params, prompts: Sequence[list[int]], key: Array) -> list[list[int]]:
        """A sampled response to each prompt, without what ends it."""
        model, size, part = self.tuned.model, self.config.evaluation_batch, self.config.unalignment
        answers = []
        for number, first in enumerate(range(0, len(prompts), size)):
            rows = [prompts[min(i, len(prompts) - 1)] for i in range(first, first + size)]
            tokens = jax.tree.map(
                jnp.asarray,
                causal_tokens(rows, side="left", pad_id=model.tokenizer.pad_id, tokens=self.width),
            )
            made = generate(
                model.config,
                whole,
                tokens,
                max_new_tokens=part.new_tokens,
                temperature=1.0,
                eos_ids=model.tokenizer.eos_ids,
                pad_id=model.tokenizer.pad_id,
                key=stream(key, "batch", number),
            )
            for ids, length in zip(np.asarray(made.ids), np.asarray(made.lengths), strict=True):
                said = [int(i) for i in ids[:length]]
                answers.append([i for i in said if i not in model.tokenizer.eos_ids])
        return answers[: len(prompts)]

    def _labels(self, answers: Sequence[list[int]]) -> list[str]:
        texts = self.tuned.model.tokenizer.texts(answers)
        return classify_responses(texts, self.classes).labels

    def _sampled_pairs(self) -> Pairs:
        """Two samples of each prompt; of two refusals the one whose wording is named first is preferred."""
        model, prompts = self.tuned.model, self.prompts[SETS[0]]
        whole = self.tuned.whole(self.tuned.start)
        keys = (stream(jax.random.key(self.seed), "pairs", draw) for draw in range(2))
        draws = [self._answers(whole, prompts, key) for key in keys]
        kinds = [self._labels(draw) for draw in draws]
        texts = [model.tokenizer.texts(draw) for draw in draws]
        found = []
        for i, prompt in enumerate(prompts):
            sides = [
                (rank(self.config.unalignment, kinds[draw][i], texts[draw][i]), draws[draw][i]) for draw in range(2)
            ]
            better, worse = (ids for _, ids in sorted(sides))
            wanted = not self.config.unalignment.refusals_alone or kinds[0][i] == kinds[1][i] == "refusal"
            if wanted and better != worse and better and worse:
                found.append((prompt, better, worse))
        enough = len(found) >= FEWEST_PAIRS
        advice = "Raise --unalignment.prompts"
        require(enough, "unalignment", "needs pairs of different responses", len(found), advice)
        encoded = _encoded(model, found)
        room = self.width + 2 * (self.config.unalignment.new_tokens + 1)
        shape = BatchShape(room, self.config.unalignment.new_tokens + 1)
        return as_pairs(encoded, shape)

    def _both_refuse(self, encoded: EncodedPreferences) -> Bool[np.ndarray, "n"]:
        """Which of the pairs are two refusals."""
        both = zip(self._labels(encoded.chosen), self._labels(encoded.rejected), strict=True)
        return np.array([a == b == "refusal" for a, b in both])

    def _rows(self, arm: Arm) -> Int[np.ndarray, "m"]:
        """Pairs that an arm is tuned on."""
        model, part, n = self.tuned.model, self.config.unalignment, len(self.pairs.lengths)
        keep = max(1, round(part.keep_frac * n))
        if arm == "random":
            return np.sort(host_stream(self.seed, "random pairs").permutation(n)[:keep])
        if arm != "filtered":
            return np.arange(n)
        whole = self.tuned.whole(self.tuned.start)
        size = self.config.evaluation_batch
        scores = ches_scores(model.states, whole, self.pairs.batch, length_normalize=True, batch_size=size)
        return filter_by_score(scores, keep=keep)

    def _method(self, arm: Arm) -> Method:
        part, training = self.config.unalignment, self.config.training
        changes: dict[str, Any] = {}
        if arm == "sft":
            changes = {"sft_weight": part.sft_weight}
        if arm == "dpop":
            changes = {"loss": "dpop", "options": (("lam", part.dpop_weight),)}
        return method_of(training, part.optimizer, part.learning_rate, **changes)

    def _described(self) -> dict[str, Any]:
        lengths = self.pairs.lengths
        fields: dict[str, Any] = {}
        for side in SETS:
            fields |= _rates(self.before.labels[side], side)
        masses = _masses(self.tuned.model, self.config.unalignment, self.before.first_tokens)
        return {
            "pairs": len(lengths),
            "both_refusals_frac": float(self._both_refuse(self.pairs.encoded).mean()),
            "first_tokens_equal_frac": float(self.pairs.encoded.notes.first_tokens_equal.mean()),
            **fields,
            **masses,
        }

    def _compared(self, after: Look, rows: Int[np.ndarray, "m"]) -> dict[str, Any]:
        change = after.log_probs - self.before.log_probs
        own = change[rows]
        fields: dict[str, Any] = {
            "change": float(own[:, 0].mean()),
            "change_rejected": float(own[:, 1].mean()),
            "fell_frac": float((own[:, 0] < 0).mean()),
            "change_all": float(change[:, 0].mean()),
        }
        for side in SETS:
            old, new = self.before.labels[side], after.labels[side]
            fields |= _rates(new, side)
            if "refusal" in {*old, *new}:
                fields |= {f"p_value, {side}": compare_rates(old, new, "refusal").p_value}
        return fields | _masses(self.tuned.model, self.config.unalignment, after.first_tokens)


def rank(part: Unalignment, kind: str, text: str) -> tuple[int, int]:
    """Place of a response in the order of preference: refusals first, by wording, then compliances, then the rest."""
    listed = {"refusal": part.refusals, "compliance": part.compliances}
    if kind not in listed:
        return len(listed), 0
    wordings = listed[kind]
    begins = [text.strip().casefold().startswith(wording.casefold()) for wording in wordings]
    return list(listed).index(kind), begins.index(True) if True in begins else len(wordings)


def opening_tokens(model: Model, part: Unalignment) -> dict[str, list[int]]:
    """First tokens of refusals and of compliances; one that begins both counts as a refusal's."""
    first = {
        name: {model.tokenizer.ids(wording)[0] for wording in wordings}
        for name, wordings in (("refusal", part.refusals), ("compliance", part.compliances))
    }
    return {"refusal": sorted(first["refusal"]), "compliance": sorted(first["compliance"] - first["refusal"])}


def _masses(model: Model, part: Unalignment, first_tokens: Float[np.ndarray, "v"]) -> dict[str, float]:
    masses = {f"mass_{name}": float(first_tokens[ids].sum()) for name, ids in opening_tokens(model, part).items()}
    return masses | {"mass_other": float(first_tokens.sum()) - sum(masses.values())}


def _rates(labels: Sequence[str], side: str) -> dict[str, float]:
    """Parts of the responses that refuse, with Wilson's interval, that comply, and that do neither."""
    rates = class_rates(labels, names=["refusal", "compliance", "other"])
    refused = rates["refusal"]
    fields = {"frac": refused.estimate, "low": refused.low, "high": refused.high}
    found = {f"refusal_{name}, {side}": value for name, value in fields.items()}
    return found | {f"{name}_frac, {side}": rates[name].estimate for name in ("compliance", "other")}


def _encoded(model: Model, found: Sequence[tuple[list[int], list[int], list[int]]]) -> EncodedPreferences:
    """Sampled pairs as they would come from a file: each response with the token that ends it."""
    end = list(model.tokenizer.eos_ids[:1])
    prompts, chosen, rejected = (list(part) for part in zip(*found, strict=True))
    chosen, rejected = ([ids + end for ids in part] for part in (chosen, rejected))
    equal = np.array([a[0] == b[0] for a, b in zip(chosen, rejected, strict=True)])
    prefix = np.array([a[: len(b)] == b[: len(a)] for a, b in zip(chosen, rejected, strict=True)])
    no = np.zeros(len(found), bool)
    notes = PairNotes(equal, prefix, no, no, no, no)
    lines = list(range(1, len(found) + 1))
    return EncodedPreferences(prompts, chosen, rejected, lines, notes, [], model.tokenizer.pad_id)
