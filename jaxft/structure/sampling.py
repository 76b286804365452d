r"""Sentences and their trees drawn from a grammar, with a given length or a bounded one: exact, without rejection.

A node with symbol A and w words splits after k with probability $\propto \sum_{BC} P(A \to BC) Z_k(B) Z_{w-k}(C)$,
then draws B, then C, where $Z_w$ is the mass of all derivations of w words (``length_log_probs``). All three draws, and
those of root, unary chain and word, invert cumulative tables that are made once, on the host, in double precision.

All sentences go through their nodes in pre-order at once: after node ``p`` comes its left child ``p + 1``, and its
right child is node ``p + 2k``, so where every node goes is known when its parent is drawn.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require
from jaxft.structure.lengths import length_log_probs
from jaxft.structure.parses import Parses
from jaxft.structure.pcfg import Grammar, LowRankPCFG, SparsePCFG, to_dense, to_sparse

MAX_CELLS = 2**28
"""Most cells of one table (1 GiB)."""


class Samples(NamedTuple):
    """Sentences with the trees they were drawn with."""

    tokens: Int[Array, "b t"]
    """Word numbers; 0 beyond the length."""
    lengths: Int[Array, "b"]
    parses: Parses
    """Its score is the log-probability of tree and words together, not given the length. With unary rules a node has
    its top symbol as label and its bottom symbol; the score sums over the chains between the two."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["cdf", "first", "size"], meta_fields=["depth", "stride"]
)
class _Cells:
    """Categorical distributions on segments of a list of cells, one row of cells a condition."""

    def __init__(self, cdf: Array, first: Array, size: Array, depth: int, stride: int):
        self.cdf, self.first, self.size, self.depth, self.stride = cdf, first, size, depth, stride

    def draw(self, u: Float[Array, "..."], row: Int[Array, "..."], segment: Int[Array, "..."]) -> Int[Array, "..."]:
        """Cell of the list: the first of the segment whose cumulative probability in this row exceeds ``u``.

        A cell of probability 0 is never drawn. ``u`` has 23 random bits, which bounds the error of a probability.
        """
        origin = self.first[segment]
        offset, low = row * self.stride, origin
        high = origin + self.size[segment]
        for bit in reversed(range(self.depth)):
            there = low + (1 << bit)
            cell = jnp.clip(offset + there - 1, 0, len(self.cdf) - 1)
            low = jnp.where((there < high) & (self.cdf[cell] <= u), there, low)
        return low


class SamplingTables(NamedTuple):
    """Everything about a grammar that sampling up to a length needs, on the device."""

    log_lengths: Float[Array, "lengths"]
    """Log-probability of each length 0 to ``max_length``."""
    length: _Cells
    root: _Cells
    chain: _Cells | None
    split: _Cells
    left: _Cells
    right: _Cells
    word: _Cells
    chain_bottom: Int[Array, "chains"]
    left_symbol: Int[Array, "rules"]
    right_symbol: Int[Array, "rules"]
    word_number: Int[Array, "entries"]
    log_root: Float[Array, "a"]
    log_chain: Float[Array, "chains"]
    log_rule: Float[Array, "rules"]
    log_word: Float[Array, "entries"]

    @property
    def max_length(self) -> int:
        """Longest sentence."""
        return len(self.log_lengths) - 1


def _cells(weights: Float[np.ndarray, "rows cells"], first: np.ndarray, size: np.ndarray) -> tuple[_Cells, np.ndarray]:
    """Cumulative distributions of the segments of each row, and the sums of the segments that are not empty.

    Every segment is scaled to 1 before the running sum over all of them, so that a small one keeps its digits. The sum
    is one sequential sum: it does not fall, and does not rise on a cell of weight 0.
    """
    rows, stride = weights.shape
    full = size > 0
    starts, counts = first[full], size[full]
    totals = np.add.reduceat(weights, starts, axis=1)
    scale = np.divide(1, totals, out=np.zeros_like(totals), where=totals > 0)
    running = np.cumsum(weights * np.repeat(scale, counts, axis=1), axis=1)
    before = np.concatenate([np.zeros((rows, 1)), running], axis=1)[:, starts]
    cdf = (running - np.repeat(before, counts, axis=1)).astype(np.float32)
    depth = int(size.max(initial=1)).bit_length()
    flat = cdf.ravel() if cdf.size else np.ones(1, np.float32)  # an empty list is looked at, but nothing comes of it
    arrays = (jnp.asarray(flat), jnp.asarray(first, jnp.int32), jnp.asarray(size, jnp.int32))
    return _Cells(*arrays, depth, stride), totals


def _segments(owner: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First cell and number of cells of each owner, in a list sorted by owner."""
    size = np.bincount(owner, minlength=count)
    return np.cumsum(size) - size, size


def sampling_tables(grammar: Grammar, max_length: int) -> SamplingTables:
    """Prepares sampling of sentences of up to ``max_length`` words.

    For R rules with G pairs of a parent and a left child, the tables hold G max_length² / 2 + R max_length numbers.

    Args:
      grammar: A concrete grammar; a low-rank one is made dense.
      max_length: Longest sentence.

    Returns:
      The tables.

    Raises:
      UserError: A traced grammar, tables that are too large, or a grammar without a sentence of up to ``max_length``.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> tables = sampling_tables(random_pcfg(jax.random.key(0), 3, 4, 6), 8)
      >>> tables.max_length, bool(tables.log_lengths[2] < 0)
      (8, True)
    """
    where = "sampling_tables"
    require(is_concrete(grammar), where, "the grammar must be concrete", "a traced one", "Make the tables before jit")
    if isinstance(grammar, LowRankPCFG):
        s, a = len(grammar.log_head), len(grammar.log_root)
        advice = "Sample from a smaller or a sparse grammar"
        require(s * a * a <= MAX_CELLS, where, "a low-rank grammar must fit as a dense one", f"{s * a * a}", advice)
        with jax.ensure_compile_time_eval():
            grammar = to_dense(grammar)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        rules = to_sparse(grammar)
        precise = jax.tree.map(lambda x: jnp.asarray(x, float) if jnp.issubdtype(x.dtype, jnp.floating) else x, rules)
        log_z = np.asarray(length_log_probs(precise, max_length))
    return _Builder(rules, log_z).tables()


class _Builder:
    """The rule list in the order of the tables, with the masses of all lengths."""

    def __init__(self, grammar: SparsePCFG, log_z: Float[np.ndarray, "lengths a"]):
        where = "sampling_tables"
        # A rule of mass 0 more: no list is empty.
        symbols = [np.append(np.asarray(x), 0) for x in (grammar.lhs, grammar.left, grammar.right)]
        order = np.lexsort(symbols[::-1])
        self.lhs, self.left, self.right = (x[order] for x in symbols)
        self.log_rule = np.append(np.asarray(grammar.log_rule, float), -np.inf)[order]
        self.log_root, self.log_emit = np.asarray(grammar.log_root, float), np.asarray(grammar.log_emit, float)
        self.s, self.a = len(self.log_root) - len(self.log_emit), len(self.log_root)
        self.log_unary = None if grammar.log_unary is None else np.asarray(grammar.log_unary, float)
        self.lengths = len(log_z)
        self.log_z = log_z
        top = log_z.max(axis=1)
        self.possible = np.isfinite(top)
        self.scale = np.where(self.possible, top, 0)
        self.z = np.exp(log_z - self.scale[:, None])
        total = np.logaddexp.reduce(log_z + self.log_root, axis=1)
        self.log_lengths = total
        possible = bool(np.isfinite(total).any())
        advice = "Ask for longer sentences, or see partition_function"
        rule = f"the grammar must have a sentence of at most {self.lengths - 1} words"
        require(possible, where, rule, "none", advice)
        new = np.append(True, (np.diff(self.lhs) != 0) | (np.diff(self.left) != 0))
        self.group = np.cumsum(new) - 1
        self.group_lhs, self.group_left = self.lhs[new], self.left[new]
        cells = len(self.group_lhs) * (self.lengths - 1) * (self.lengths - 2) // 2
        cells = max(cells, len(self.lhs) * self.lengths)
        require(cells <= MAX_CELLS, where, f"a table may hold {MAX_CELLS} numbers", cells, "Lower max_length")

    def tables(self) -> SamplingTables:
        right, left, split, bottom = self._branches()
        chain, chain_bottom, log_chain = self._chains(bottom)
        whole = np.zeros(1, int)
        lengths = np.exp(self.log_lengths - self.log_lengths.max())
        length, _ = _cells(lengths[None], whole, np.array([self.lengths]))
        root, _ = _cells(np.exp(self.log_root) * self.z, whole, np.array([self.a]))
        tag, number = np.nonzero(np.isfinite(self.log_emit))
        log_word = self.log_emit[tag, number]
        word, _ = _cells(np.exp(log_word)[None], *_segments(tag, len(self.log_emit)))
        integers = (chain_bottom, self.left, self.right, number)
        floats = (self.log_root, log_chain, self.log_rule, log_word)
        return SamplingTables(
            jnp.asarray(self.log_lengths, jnp.float32),
            *(length, root, chain, split, left, right, word),
            *(jnp.asarray(x, jnp.int32) for x in integers),
            *(jnp.asarray(x, jnp.float32) for x in floats),
        )

    def _branches(self) -> tuple[_Cells, _Cells, _Cells, Float[np.ndarray, "lengths s"]]:
        """Tables of right child, left child and split, and the masses of w words from a binary rule."""
        n, groups = self.lengths, len(self.group_lhs)
        right, mass = _cells(np.exp(self.log_rule) * self.z[:, self.right], *_segments(self.group, groups))
        widths, lefts = np.array([(w, k) for w in range(2, n) for k in range(1, w)], int).reshape(-1, 2).T
        segments = _segments(self.group_lhs, self.s)
        left, sums = _cells(self.z[lefts][:, self.group_left] * mass[widths - lefts], *segments)
        # Splits of w words lie in a row of their own, w s cells from the first, so that sizes differ by row alone.
        weights = np.zeros((n, self.s, n))
        possible = self.possible[lefts] & self.possible[widths - lefts] & self.possible[widths]
        factor = np.exp(
            np.where(possible, self.scale[lefts] + self.scale[widths - lefts] - self.scale[widths], -np.inf)
        )
        weights[widths[:, None], np.flatnonzero(segments[1])[None], lefts[:, None]] = sums * factor[:, None]
        split, totals = _cells(weights.reshape(n, -1), n * np.arange(self.s), np.full(self.s, n))
        return right, left, split, totals

    def _chains(self, bottom: Float[np.ndarray, "lengths s"]) -> tuple[_Cells | None, np.ndarray, np.ndarray]:
        """Table of the bottom symbol of each top symbol, and the list of (top, bottom) that it refers to."""
        if self.log_unary is None:
            return None, np.zeros(0, int), np.zeros(0)
        unary = np.zeros((self.a, self.a))
        unary[: self.s] = np.exp(self.log_unary)
        reach = np.eye(self.a) + (unary > 0)
        for _ in range(int(self.s).bit_length()):
            reach = (reach @ reach > 0).astype(float)
        # The inverse is not exactly 0 where no chain leads.
        closure = np.linalg.inv(np.eye(self.a) - unary) * reach
        tops, bottoms = np.nonzero(closure > 0)
        masses = np.zeros((self.lengths, self.a))
        masses[2:, : self.s] = bottom[2:]
        masses[1, self.s :] = np.exp(self.log_emit).sum(axis=1)
        chain, _ = _cells(closure[tops, bottoms] * masses[:, bottoms], *_segments(tops, self.a))
        return chain, bottoms, np.log(closure[tops, bottoms])


def sample_sentences(
    grammar: Grammar | SamplingTables,
    *,
    key: Array,
    num: int,
    lengths: int | Int[Array, "b"] | Int[np.ndarray, "b"] | None = None,
    max_length: int | None = None,
    start: int | Int[Array, ""] = 0,
    chunk: int = 32768,
) -> Samples:
    r"""Draws sentences with their trees: given lengths, or the grammar's own law restricted to a greatest length.

    With ``lengths`` sentence i comes from $P(T, x \mid |x| = \text{lengths}_i)$, without it from
    $P(T, x \mid |x| \le \text{max\_length})$. The draws are exact up to the 23 random bits of each choice. Sentence i
    is a function of ``key``, ``start + i``, its length and the tables alone: parts of a corpus may be drawn anywhere,
    in any order.

    Args:
      grammar: A concrete grammar, or its tables, which are then made once and may pass through ``jit``.
      key: Random key.
      num: Number of sentences.
      lengths: Words of each sentence, or of all.
      max_length: Longest sentence, t; ``None``: that of the tables, or the greatest of ``lengths``.
      start: Number of the first sentence in the endless corpus of this key.
      chunk: Most sentences at a time; the memory of a call grows with it, times t.

    Returns:
      The sentences; under ``jit`` one whose length is impossible has length 0 and no valid node.

    Raises:
      UserError: Neither lengths nor a greatest length, or a length that no sentence has.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> grammar = random_pcfg(jax.random.key(0), 3, 4, 6)
      >>> drawn = sample_sentences(grammar, key=jax.random.key(1), num=2, lengths=5)
      >>> drawn.tokens.shape, drawn.lengths.tolist(), drawn.parses.valid.sum(axis=1).tolist()
      ((2, 5), [5, 5], [9, 9])
    """
    where = "sample_sentences"
    require(num >= 1, where, "num must be at least 1", num, "Pass the number of sentences")
    require(chunk >= 1, where, "chunk must be at least 1", chunk, "Use the default")
    if not isinstance(grammar, SamplingTables):
        greatest = max_length
        if greatest is None:
            given = lengths is not None and is_concrete(lengths)
            require(given, where, "lengths or max_length must be given", "neither", "Pass max_length")
            low, greatest = int(np.min(np.asarray(lengths))), int(np.max(np.asarray(lengths)))
            require(low >= 1, where, "lengths must be positive", low, "Ask for 1 word or more")
        grammar = sampling_tables(grammar, greatest)
    rule = "max_length must be that of the tables"
    require(max_length in (None, grammar.max_length), where, rule, max_length, f"Leave it out: {grammar.max_length}")
    if lengths is not None:
        lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (num,))
        _require_possible(where, grammar, lengths)
    even = -(-num // -(-num // chunk))
    return _sample(grammar, key, jnp.asarray(start, jnp.int32), lengths, num=num, chunk=even)


def _require_possible(where: str, tables: SamplingTables, lengths: Int[Array, "b"]) -> None:
    if is_concrete((tables, lengths)):
        possible = np.flatnonzero(np.isfinite(np.asarray(tables.log_lengths)))
        bad = np.setdiff1d(np.asarray(lengths), possible)
        shown = ", ".join(map(str, possible[:20].tolist())) + (", ..." if len(possible) > 20 else "")
        advice = f"Possible up to {tables.max_length}: {shown}"
        require(len(bad) == 0, where, "sentences of each length must exist", bad.tolist()[:10], advice)


@functools.partial(jax.jit, static_argnames=("num", "chunk"))
def _sample(
    tables: SamplingTables, key: Array, start: Array, lengths: Array | None, *, num: int, chunk: int
) -> Samples:
    chunks = -(-num // chunk)
    numbers = (start + jnp.arange(chunks * chunk, dtype=jnp.int32)).reshape(chunks, chunk)
    if lengths is not None:
        lengths = jnp.pad(lengths, (0, chunks * chunk - num)).reshape(chunks, chunk)
    drawn = jax.lax.map(lambda part: _sample_chunk(tables, key, *part), (numbers, lengths))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num], drawn)


def _sample_chunk(tables: SamplingTables, key: Array, numbers: Int[Array, "b"], lengths: Array | None) -> Samples:
    t = tables.max_length
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    draws = (3 if tables.chain is None else 4) * (2 * t - 1)
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (2 + draws + t,), jnp.float32))(keys).T
    zero = jnp.zeros_like(numbers)
    if lengths is None:
        lengths = tables.length.draw(uniform[0], zero, zero)
    inside = (lengths >= 0) & (lengths <= t)
    lengths = jnp.where(inside, lengths, 0)
    lengths = jnp.where(tables.log_lengths[lengths] > -jnp.inf, lengths, 0)
    root = tables.root.draw(uniform[1], lengths, zero)
    tops, bottoms, widths, score = _sample_nodes(
        tables, root, lengths, uniform[2:-t].reshape(2 * t - 1, -1, len(numbers))
    )
    leaf, valid = widths == 1, widths > 0
    begins = jnp.cumsum(leaf, axis=1, dtype=jnp.int32) - leaf.astype(jnp.int32)
    at = jnp.where(leaf, begins, t)
    rows = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    tags = jnp.zeros((len(numbers), t), jnp.int32).at[rows, at].set(bottoms, mode="drop")
    exists = jax.lax.broadcasted_iota(jnp.int32, tags.shape, 1) < lengths[:, None]
    s = len(tables.log_root) - len(tables.word.first)
    entry = tables.word.draw(uniform[-t:].T, jnp.zeros_like(tags), jnp.where(exists, tags - s, 0))
    score = score + jnp.where(exists, tables.log_word[entry], 0).sum(axis=1)
    score = jnp.where(lengths > 0, score + tables.log_root[root], -jnp.inf)
    tokens = jnp.where(exists, tables.word_number[entry], 0)
    spans = jnp.where(valid[..., None], jnp.stack([begins, begins + widths], axis=2), 0)
    parses = Parses(spans, jnp.where(valid, tops, 0), valid, score)
    if tables.chain is not None:
        parses = parses._replace(bottoms=jnp.where(valid, bottoms, 0))
    return Samples(tokens, lengths, parses)


def _sample_nodes(
    tables: SamplingTables, root: Int[Array, "b"], lengths: Int[Array, "b"], uniform: Float[Array, "nodes draws b"]
) -> tuple[Int[Array, "b nodes"], Int[Array, "b nodes"], Int[Array, "b nodes"], Float[Array, "b"]]:
    """Top and bottom symbols and widths of all nodes, and the log-probability of chains and rules."""
    nodes, b = len(uniform), len(root)
    batch = jnp.arange(b)
    base = jnp.int32(tables.max_length + 1)

    def step(carry, at):
        waiting, left, score = carry
        number, u = at
        code = jnp.where(left > 0, left, waiting[number])  # a left child follows its parent at once
        top, width = code // base, code % base
        bottom = top
        if tables.chain is not None:
            chain = tables.chain.draw(u[3], width, top)
            bottom = jnp.where(width > 0, tables.chain_bottom[chain], 0)
            score = score + jnp.where(width > 0, tables.log_chain[chain], 0)
        branches = width > 1
        parent = jnp.where(branches, bottom, 0)
        k, rule = _sample_branch(tables, parent, width, u)
        k = jnp.where(branches, k, 0)
        score = score + jnp.where(branches, tables.log_rule[rule], 0)
        left = jnp.where(branches, tables.left_symbol[rule] * base + k, 0)
        right = tables.right_symbol[rule] * base + width - k
        waiting = waiting.at[jnp.where(branches, number + 2 * k, nodes), batch].set(right, mode="drop")
        return (waiting, left, score), (top, bottom, width)

    waiting = jnp.zeros((nodes, b), jnp.int32)
    carry = (waiting, root * base + lengths, jnp.zeros(b, jnp.float32))
    (_, _, score), drawn = jax.lax.scan(step, carry, (jnp.arange(nodes, dtype=jnp.int32), uniform))
    tops, bottoms, widths = (x.T for x in drawn)
    return tops, bottoms, widths, score


def _sample_branch(
    tables: SamplingTables, parent: Int[Array, "b"], width: Int[Array, "b"], u: Float[Array, "draws b"]
) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
    """Width of the left child, and the rule."""
    k = tables.split.draw(u[0], width, parent) - parent * (tables.max_length + 1)
    pair = jnp.maximum((width - 1) * (width - 2) // 2 + k - 1, 0)  # in the order of widths, then of left children
    group = tables.left.draw(u[1], pair, parent)
    return k, tables.right.draw(u[2], width - k, group)
