"""The run itself: every model from every starting point, in a fixed order, each resumed where it was left.

A network is trained, and probed before and after. Steps are numbered through the run: network p holds steps
p * (steps + 1) to p * (steps + 1) + steps, the first of them its start.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.pcfg_parsing.config import PcfgParsingConfig
from experiments.pcfg_parsing.corpus import TrainingSentences
from experiments.pcfg_parsing.held_out import coverage_note, held_out_rows
from experiments.pcfg_parsing.inside_network import network_records
from experiments.pcfg_parsing.parsers import PARSERS, depth_ceilings, parser_f1
from experiments.pcfg_parsing.prepare import Prepared, gap_to_bayes
from experiments.pcfg_parsing.training import encoder_config, hidden_word_log_probs, initial_params, trainer
from jaxft.core.types import Params
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.resumable import Resumable, Stopped, resume
from jaxft.lab.run import Run
from jaxft.nn import EncoderConfig
from jaxft.structure.binarize import BinarizationScheme
from jaxft.structure.pcfg import SparsePCFG
from jaxft.train import FitState, NonFiniteLossError, fit, init_fit, init_state
from jaxft.train.loop import Segment


@dataclasses.dataclass(frozen=True)
class Context(Resumable):
    """What all networks of a run share."""

    config: PcfgParsingConfig
    prepared: Prepared
    sentences: TrainingSentences


def execute(
    config: PcfgParsingConfig, run: Run, stop: Interrupts, prepared: Prepared, mesh: Mesh | None, advance: Any
) -> int:
    """Trains and measures all networks, and returns how many came to an end; what is done is not done again.

    A network whose loss or parameters are no longer finite is recorded as ``diverged``, and the next one begins.

    Raises:
      Stopped: The user asked to.
    """
    with resume(run, stop, mesh=mesh, sharding=config.training.sharding) as resumable:
        sentences = TrainingSentences(config, prepared.tables, prepared.layout)
        context = Context(**vars(resumable), config=config, prepared=prepared, sentences=sentences)
        _of_the_grammar(context)
        ended = 0
        for number, (model, seed) in enumerate((m, s) for m in config.models for s in config.seeds):
            key = {"model": model, "seed": seed}
            if context.recorded("result", key):
                ended += 1
            elif not context.recorded("diverged", key):
                ended += _network(context, number, model, seed)
            advance(note=f"{model}, seed {seed}")
    return ended


def networks_of(config: PcfgParsingConfig) -> int:
    """Number of networks of a run."""
    return len(config.models) * len(config.seeds)


def _of_the_grammar(context: Context) -> None:
    """What is known before any network: the Bayes loss, and how well exact parsers do."""
    heldout = context.prepared.heldout
    if not context.recorded("bayes", {}):
        losses = {name: getattr(heldout, name) for name in ("bayes_loss_nats", "unigram_loss_nats", "wrong_loss_nats")}
        ceilings = {f"{name}_ceiling": value for name, value in depth_ceilings(context.prepared.test).items()}
        context.record(0, "bayes", hidden_words=heldout.words, **losses, **ceilings)
    _of_the_treebank(context)
    for name in PARSERS:
        if not context.recorded("parser", {"parser": name}):
            context.record(0, "parser", parser=name, f1=parser_f1(context.prepared, name))


def _of_the_treebank(context: Context) -> None:
    """How well the grammar parses trees that it was not read from."""
    source, corpus = context.prepared.source, context.config.corpus
    if not source.held_out or context.recorded("coverage", {}):
        return
    assert isinstance(source.grammar, SparsePCFG)  # a grammar of a treebank
    scheme = source.scheme or BinarizationScheme()
    for row in held_out_rows(source.grammar, source.held_out, scheme, max_words=corpus.parsed_length):
        if not context.recorded("treebank", {"parser": row["parser"]}):
            context.record(0, "treebank", **row)
    context.record(0, "coverage", said=coverage_note(source.grammar, source.held_out, scheme))


def _network(context: Context, number: int, model: str, seed: int) -> bool:
    """Trains and probes one network, and returns whether it came to an end rather than diverged."""
    config, training, prepared = context.config, context.config.training, context.prepared
    base = number * (training.steps + 1)
    key = {"model": model, "seed": seed}
    encoder = encoder_config(config, model, prepared.layout)
    params = initial_params(encoder, seed)
    tx, segment = trainer(encoder, training, context.mesh)
    state = context.place(init_fit(init_state(params, tx)))
    if base <= context.restored <= base + training.steps:
        state = context.checkpoints.restore(context.restored, state)
    else:
        _record_gap(context, base, key, encoder, params, step=0, loss=None)
        _record_inside(context, base, key, encoder, params, trained=False)

    def on_event(state: FitState, losses: np.ndarray, _: float) -> bool:
        step = int(state.train.step)
        _record_gap(context, base + step, key, encoder, state.train.params, step=step, loss=float(losses.mean()))
        context.run.records.sync()
        context.checkpoints.save(base + step, state)
        context.run.mark("running", step=base + step)
        return context.stop.requested

    try:
        state = _train(context, state, segment, on_event)
    except NonFiniteLossError as diverged:
        # A resumed run takes the same steps from the last checkpoint, and diverges again if this record was cut back.
        reason = str(diverged).split(". ")[0]
        context.record(base + diverged.step, "diverged", **key, local_step=diverged.step, reason=reason)
        return False
    _record_inside(context, base + training.steps, key, encoder, state.train.params, trained=True)
    gap = next(r for r in reversed(context.history) if r["kind"] == "event" and key.items() <= r.items())
    context.record(base + training.steps, "result", **key, gap_nats=gap["gap_nats"], gap_stderr=gap["gap_stderr"])
    return True


def _train(context: Context, state: FitState, segment: Segment, on_event: Any) -> FitState:
    """Segment by segment, each with its own sentences: a corpus of any size passes through the same memory."""
    training = context.config.training
    while (start := int(state.train.step)) < training.steps:
        stop = min((start // training.event_every + 1) * training.event_every, training.steps)
        inputs, hidden = context.sentences.between(start, stop)
        rows = np.arange(len(hidden)).reshape(stop - start, training.batch_size)
        state = fit(
            segment,
            state,
            inputs,
            hidden,
            batches=lambda first, last, rows=rows, start=start: rows[first - start : last - start],
            steps=stop,
            event_every=training.event_every,
            on_event=on_event,
        )
        if context.stop.requested:
            raise Stopped
    return state


def _record_gap(
    context: Context, at: int, key: dict[str, Any], encoder: EncoderConfig, params: Params, *, step: int, loss: Any
) -> None:
    """The gap to the Bayes loss on the held-out sentences."""
    heldout = context.prepared.heldout
    log_model = hidden_word_log_probs(encoder, context.prepared.layout.first_word_id)(
        params, heldout.batch, jnp.asarray(heldout.rows), jnp.asarray(heldout.columns)
    )
    gap, stderr = gap_to_bayes(np.asarray(log_model), heldout)
    fields = {"local_step": step, "batch_loss_nats": loss, "gap_nats": gap, "gap_stderr": stderr}
    context.record(at, "event", **key, **fields)


def _record_inside(
    context: Context, at: int, key: dict[str, Any], encoder: EncoderConfig, params: Params, *, trained: bool
) -> None:
    """Probes and attention of a network; what an earlier start has recorded is not recorded again."""
    key = {**key, "trained": trained}
    probes, heads, predicted = network_records(encoder, params, context.prepared, context.config)
    for kind, found in (("probe", probes), ("attention", heads)):
        names = ("target", "probe", "layer") if kind == "probe" else ("layer", "head")
        for fields in found:
            if not context.recorded(kind, {**key, **{name: fields[name] for name in names}}):
                context.record(at, kind, **key, **fields)
    name = f"{key['model']}-{key['seed']}-{'trained' if trained else 'untrained'}"
    context.run.save_arrays(name, **predicted)
