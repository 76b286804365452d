"""Part single: one prompt, two answers of one token, tuned on step by step, every step predicted to first order."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.likelihood_displacement.config import LikelihoodDisplacementConfig, Moved, Optimizer, Single, sides
from experiments.likelihood_displacement.prepare import (
    Loaded,
    answer_batch,
    answer_ids,
    leaves_by_name,
    params_like,
    single_prompts,
)
from experiments.likelihood_displacement.tuners import (
    Method,
    Phase,
    Tuned,
    compiled,
    make_trainer,
    method_of,
    preconditioner_of,
    run_phase,
)
from jaxft.core.rng import host_stream
from jaxft.core.statistics import rank_correlation
from jaxft.core.trees import tree_axpy, tree_cast, tree_sub
from jaxft.core.types import Params, ResponseBatch
from jaxft.data.batching import batch_indices
from jaxft.lab.resumable import Resumable
from jaxft.train import TrainState
from jaxft.tuning.ches import ches_terms
from jaxft.tuning.directions import flow_direction
from jaxft.tuning.gains import mass_flow, who_gains
from jaxft.tuning.objectives import PreferenceLabels, loss_slopes, preference_loss
from jaxft.tuning.preference_gram import displacement_rate, preference_gram
from jaxft.tuning.reference import reference_log_probs
from jaxft.tuning.unembedding import unembedding_decomposition

SIZES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Steps of gradient descent that are tried at the start: predicted changes of the margin, in nats."""

SHOWN = 4
"""Tokens that a record names."""


class Plan(NamedTuple):
    """One run of this part."""

    phase: Phase
    comparison: str
    prompt: int
    moved: Moved
    optimizer: Optimizer


class Problem(NamedTuple):
    """A prompt with its two answers, and what they are scored against."""

    batch: ResponseBatch
    labels: PreferenceLabels
    answers: tuple[int, int]


def sft_phases(single: Single, base: int) -> dict[str, Phase]:
    """Supervised tuning on each preferred answer."""
    answers = sides_chosen(single) if single.sft_steps else []
    steps = single.sft_steps
    return {
        answer: Phase(base + i * (steps + 1), steps, {"part": "sft", "answer": answer})
        for i, answer in enumerate(answers)
    }


def single_plans(single: Single, base: int) -> list[Plan]:
    """All runs of this part, in order."""
    plans = []
    for comparison in single.comparisons:
        for prompt in range(single.prompts):
            for moved in single.arms:
                for optimizer in single.optimizers:
                    first = base + len(plans) * (single.steps + 1)
                    key = {"comparison": comparison, "prompt": prompt, "moved": moved, "optimizer": optimizer}
                    phase = Phase(first, single.steps, {"part": "single", **key})
                    plans.append(Plan(phase, comparison, prompt, moved, optimizer))
    return plans


def run_single(
    config: LikelihoodDisplacementConfig,
    context: Resumable,
    loaded: Loaded,
    tuned: Tuned,
    sft: Mapping[str, Phase],
    plans: list[Plan],
) -> Iterator[tuple[Plan, bool]]:
    """Runs what an earlier start has not done; each run with whether it came to an end."""
    prompts = single_prompts(config, loaded)
    tokens = max(map(len, prompts)) + 2
    left = {sides(plan.comparison)[0] for plan in plans if not _over(context, plan)}
    starts: dict[str, Params | None] = {}
    for answer in sides_chosen(config.single):
        if answer in left:
            taught = prompts[config.single.prompts :]
            starts[answer] = _taught(config, context, tuned, sft.get(answer), taught, answer, tokens)
    for plan in plans:
        key = plan.phase.key
        if not _over(context, plan):
            start = starts[sides(plan.comparison)[0]]
            if start is None:
                context.record(plan.phase.base, "diverged", **key, local_step=0, reason="supervised tuning diverged")
            else:
                _run(config, context, tuned, plan, start, prompts[plan.prompt], tokens)
        yield plan, context.recorded("result", key)


def sides_chosen(single: Single) -> list[str]:
    """The preferred answers, each once."""
    return list(dict.fromkeys(sides(comparison)[0] for comparison in single.comparisons))


def _over(context: Resumable, plan: Plan) -> bool:
    return context.recorded("result", plan.phase.key) or context.recorded("diverged", plan.phase.key)


def _taught(
    config: LikelihoodDisplacementConfig,
    context: Resumable,
    tuned: Tuned,
    phase: Phase | None,
    prompts: list[list[int]],
    answer: str,
    tokens: int,
) -> Params | None:
    """What is trained after supervised tuning on one answer, made once, then read; ``None`` where that diverged."""
    if phase is None:
        return tuned.start
    name = f"sft-{sides_chosen(config.single).index(answer)}"
    if context.recorded("diverged", phase.key):
        return None
    if not (context.recorded("result", phase.key) and context.run.has_arrays(name)):
        single, model = config.single, tuned.model
        ids = [model.tokenizer.ids(answer)[0]] * 2  # a second response, which this loss does not see
        batch = answer_batch(model, prompts, ids, tokens=tokens)
        b = config.training.batch_size
        index = batch_indices(len(prompts), b, seed=config.seed, name=f"sft {answer}", stop=single.sft_steps)
        method = Method("sft", 1.0, "adam", single.sft_rate, accumulate=config.training.accumulate)
        trainer = make_trainer(tuned, method, context.mesh)
        labels = PreferenceLabels(lengths=jnp.ones((len(prompts), 2), jnp.int32))
        trained = run_phase(context, phase, trainer, tuned.start, batch, labels, index)
        if trained is None:
            return None
        context.run.save_arrays(name, **leaves_by_name(trained))
        if not context.recorded("result", phase.key):
            f = tuned.outputs(model.log_probs)
            found = reference_log_probs(f, trained, batch, batch_size=b, mesh=context.mesh)
            context.record(phase.end, "result", **phase.key, log_prob=float(found[:, 0].mean()))
    return context.place(params_like(tuned.start, context.run.load_arrays(name)))


def _run(
    config: LikelihoodDisplacementConfig,
    context: Resumable,
    tuned: Tuned,
    plan: Plan,
    start: Params,
    prompt: list[int],
    tokens: int,
) -> None:
    """One run: what is known beforehand, every step, and what came of it."""
    single, model, phase = config.single, tuned.model, plan.phase
    rate = getattr(single, f"{plan.optimizer}_rate")
    method = method_of(config.training, plan.optimizer, rate, plan.moved, accumulate=1)
    answers = answer_ids(model, plan.comparison)
    batch = answer_batch(model, [prompt], answers, tokens=tokens)
    f = compiled(tuned.outputs(model.log_probs))
    reference = f(start, batch)
    problem = Problem(batch, PreferenceLabels(reference, jnp.ones((1, 2), jnp.int32)), answers)
    trainer = make_trainer(tuned, method, context.mesh)
    first = _predicted_flow(tuned, method, trainer[0], start, problem)
    if not context.recorded("start", phase.key):
        known = make_description(tuned, plan.moved)(start, batch)
        context.record(phase.base, "start", **phase.key, **{name: float(x) for name, x in known.items()})
        if plan.prompt == 0 and plan.optimizer == config.single.optimizers[0]:
            for fields in list(step_sizes(tuned, method, start, problem)):
                context.record(phase.base, "step_size", **phase.key, **fields)
    measure, flows = make_event(tuned, method), []

    def event(before: Params, state: TrainState, loss: float) -> dict[str, Any]:
        fields, flow = measure(before, state, problem.batch, problem.labels)
        flows.append(np.asarray(flow, np.float64))
        if len(flows) == single.steps:  # before the checkpoint of the last step, after which no event comes again
            context.run.save_arrays(f"flow-{phase.base}", flow=np.sum(flows, axis=0))
        return {"loss": loss} | {name: float(x) for name, x in fields.items()}

    # As many copies of the one example as there are devices: their mean is the example.
    index = np.zeros((single.steps, 1 if context.mesh is None else context.mesh.size), np.int64)
    trained = run_phase(context, phase, trainer, start, problem.batch, problem.labels, index, event=event)
    if trained is None:
        return
    logits = [compiled(tuned.outputs(model.first_logits))(p, problem.batch) for p in (start, trained)]
    table = model.table(tuned.whole(start))
    steps = context.run.load_arrays(f"flow-{phase.base}")["flow"]
    found, arrays = _gained(model, table, problem, first, steps, logits, seed=phase.base)
    context.run.save_arrays(f"single-{phase.base}", **arrays)
    after = f(trained, problem.batch)
    fields = {"log_chosen": float(after[0, 0]), "log_rejected": float(after[0, 1])}
    loss = float(_losses(method, after, problem.labels)[0])
    context.record(phase.end, "result", **phase.key, **fields, loss=loss, **found)


def _losses(method: Method, log_probs: Array, labels: PreferenceLabels) -> Array:
    options = dict(method.options)
    return preference_loss(method.loss, log_probs, labels.reference, labels.lengths, beta=method.beta, **options)


def _slopes(method: Method, log_probs: Array, labels: PreferenceLabels) -> Array:
    options = dict(method.options)
    return loss_slopes(method.loss, log_probs, labels.reference, labels.lengths, beta=method.beta, **options)


def _predicted_flow(tuned: Tuned, method: Method, tx: Any, start: Params, problem: Problem):
    """What the first step makes of every token, to first order."""
    f, logits = (tuned.outputs(g) for g in (tuned.model.log_probs, tuned.model.first_logits))
    slopes = _slopes(method, jnp.asarray(problem.labels.reference), problem.labels)
    return who_gains(
        logits, f, start, problem.batch, slopes, top=SHOWN, by="mass", transform=tx, opt_state=tx.init(start)
    )


@functools.cache
def make_gram(tuned: Tuned, moved: Moved) -> Callable[[Params, ResponseBatch], Float[Array, "n r r"]]:
    """Compiled: inner products of the gradients of log-probabilities in what moves."""
    f, mask = tuned.outputs(tuned.model.log_probs), tuned.mask(moved)
    return jax.jit(lambda params, batch: preference_gram(f, params, batch, param_mask=mask))


@functools.cache
def make_description(tuned: Tuned, moved: Moved) -> Callable[[Params, ResponseBatch], dict[str, Float[Array, ""]]]:
    """Compiled: what is known before the first step: log-probabilities, terms of Theorem 4, inner products."""
    f, model, products = tuned.outputs(tuned.model.log_probs), tuned.model, make_gram(tuned, moved)

    @jax.jit
    def described(start: Params, batch: ResponseBatch):
        whole = tuned.whole(start)
        table, log_probs = model.table(whole), f(start, batch)[0]
        terms = ches_terms(model.states(whole, batch), batch.targets, batch.mask, table)
        split = unembedding_decomposition(table, batch.targets[0, 0, 0], batch.targets[0, 1, 0])
        gram = products(start, batch)[0]
        named = {"log_chosen": log_probs[0], "log_rejected": log_probs[1]}
        named |= {"term_norms": terms.norms[0], "term_words": terms.words[0], "term_states": terms.states[0]}
        named |= {"inner_chosen": gram[0, 0], "inner_rejected": gram[1, 1], "inner_between": gram[0, 1]}
        return named | {"unembedding_parallel": split.parallel, "unembedding_orthogonal": split.orthogonal}

    return described


@functools.cache
def make_event(
    tuned: Tuned, method: Method
) -> Callable[
    [Params, TrainState, ResponseBatch, PreferenceLabels], tuple[dict[str, Float[Array, ""]], Float[Array, "2 v"]]
]:
    """Compiled: what a step did, beside what its Gram matrix and its very update predict to first order.

    Second come the predicted changes of every token as the first of a response, of its logarithm and its probability.
    """
    f, logits = (tuned.outputs(g) for g in (tuned.model.log_probs, tuned.model.first_logits))
    mask = tuned.mask(method.moved)

    @jax.jit
    def measured(before: Params, state: TrainState, batch: ResponseBatch, labels: PreferenceLabels):
        update = tree_sub(state.params, before)

        def followed(p: Params):
            return f(p, batch), jax.nn.log_softmax(logits(p, batch)[0])

        (old, tokens), (predicted, flow) = jax.jvp(followed, (before,), (update,))
        diagonal = preconditioner_of(state, method.optimizer)
        gram = preference_gram(f, before, batch, preconditioner=diagonal, param_mask=mask)
        rate = displacement_rate(gram, _slopes(method, old, labels)) * method.rate
        change = f(state.params, batch) - old
        out = {}
        for i, side in enumerate(("chosen", "rejected")):
            out |= {f"log_{side}": old[0, i], f"change_{side}": change[0, i]}
            out |= {f"predicted_{side}": predicted[0, i], f"gram_{side}": rate[0, i]}
        return out, jnp.stack([flow, jnp.exp(tokens) * flow])

    return measured


def step_sizes(tuned: Tuned, method: Method, start: Params, problem: Problem) -> Iterator[dict[str, float]]:
    """Error of the first-order prediction of a step of gradient descent, by its size; in float64.

    The error is that of both answers together, relative to the prediction. ``swapped`` is what comes of a Gram matrix
    whose two responses are exchanged.
    """
    plain, mask = tuned.outputs(tuned.model.log_probs), tuned.mask(method.moved)
    f = compiled(plain)
    with jax.enable_x64(True):
        params, labels = (tree_cast(tree, np.dtype("float64")) for tree in (start, problem.labels))
        old = f(params, problem.batch)
        labels = labels._replace(reference=old)
        slopes = _slopes(method, old, labels)
        gram = make_gram(tuned, method.moved)(params, problem.batch)
        rate, swapped = (displacement_rate(g, slopes)[0] for g in (gram, gram[:, ::-1, ::-1]))
        direction = flow_direction(plain, params, problem.batch, slopes, param_mask=mask)
        for size in SIZES:
            step = size / jnp.abs(rate[0] - rate[1])
            change = (f(tree_axpy(step, direction, params), problem.batch) - old)[0]
            errors = [jnp.linalg.norm(change - step * r) / jnp.linalg.norm(step * r) for r in (rate, swapped)]
            yield {"size": size, "error": float(errors[0]), "swapped": float(errors[1])}


def _gained(
    model: Any, table: Float[Array, "v d"], problem: Problem, first: Any, steps: Any, logits: list[Array], *, seed: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Which tokens gained, beside which were to gain by the first step, and by Theorem 5's inner products alone.

    ``steps`` has the sums of the first-order changes of all steps, of logarithms and of probabilities.
    """
    flow = mass_flow(*logits, top=SHOWN)
    chosen, rejected = problem.answers
    between = np.asarray(table @ (table[chosen] - table[rejected]), np.float64)
    measured, predicted = (np.asarray(x.log_change[0], np.float64) for x in (flow, first))
    others = np.setdiff1d(np.arange(len(between)), [chosen, rejected])
    shuffled = host_stream(seed, "shuffled tokens").permutation(others)
    fields: dict[str, Any] = {
        "rank_predicted": rank_correlation(predicted[others], measured[others]).estimate,
        "rank_steps": rank_correlation(steps[0][others], measured[others]).estimate,
        "rank_shuffled": rank_correlation(predicted[shuffled], measured[others]).estimate,
        "rank_unembedding": rank_correlation(between[others], measured[others]).estimate,
    }
    mass = np.asarray(flow.mass_change[0], np.float64)
    for name, ids in (("gainers", flow.gainers[0]), ("predicted_gainers", first.gainers[0])):
        fields[name] = [model.word(int(i)) for i in ids]
    fields["gained_mass"] = [float(mass[int(i)]) for i in flow.gainers[0]]
    fields["predicted_mass"] = [float(first.mass_change[0, int(i)]) for i in flow.gainers[0]]
    arrays = {"log_change": measured, "first_log_change": predicted, "mass_change": mass, "unembedding": between}
    arrays |= {"steps_log_change": steps[0], "steps_mass_change": steps[1]}
    return fields, {name: x.astype(np.float32) for name, x in arrays.items()}
