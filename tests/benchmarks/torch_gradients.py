"""Gradients of the log-probabilities of a pair's responses in torch, dense, and their inner products.

Models are those of transformers, pairs as in ``torch_preferences``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call, jvp
from torch.nn import functional

from tests.benchmarks.torch_preferences import Pair

__all__ = ["exact_ches", "preference_gram", "word_rates", "word_rates_forward"]


@torch.no_grad()
def exact_ches(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """By the gradients of both responses with respect to the unembedding, ``[v, d]`` each."""
    table, scores = model.get_output_embeddings().weight, []
    for prompt, chosen, rejected in pairs:
        grads = []
        for response in (chosen, rejected):
            ids = torch.tensor([[*prompt, *response]])
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
            errors = -(states @ table.T).softmax(-1)
            errors[torch.arange(len(response)), torch.tensor(response)] += 1
            grads.append(errors.T @ states)
        scores.append((grads[0] * grads[1]).sum() - (grads[0] ** 2).sum())
    return torch.stack(scores)


def preference_gram(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """``[n, 2, 2]``: a backward pass a response."""
    weights, found = list(model.parameters()), []
    for prompt, *responses in pairs:
        grads = [torch.autograd.grad(_log_prob(model, prompt, response), weights) for response in responses]
        gram = [[sum((a * b).sum() for a, b in zip(g, h, strict=True)) for h in grads] for g in grads]
        found.append(torch.tensor(gram))
    return torch.stack(found)


def word_rates(model: Any, pair: Pair, words: Sequence[int], *, slope: float) -> torch.Tensor:
    """Rates of log-probabilities of words as the next token, a backward pass each, as a loss of this slope falls."""
    weights, (prompt, *responses) = list(model.parameters()), pair
    chosen, rejected = (torch.autograd.grad(_log_prob(model, prompt, y), weights) for y in responses)
    direction = [-slope * (a - b) for a, b in zip(chosen, rejected, strict=True)]
    states = model.base_model(input_ids=torch.tensor([[*prompt]]), use_cache=False).last_hidden_state[0, -1]
    log_probs = model.get_output_embeddings()(states).log_softmax(-1)
    rates = []
    for word in words:
        grads = torch.autograd.grad(log_probs[word], weights, retain_graph=True)
        rates.append(sum((a * b).sum() for a, b in zip(grads, direction, strict=True)))
    return torch.tensor(rates)


def word_rates_forward(model: Any, pair: Pair, *, slope: float) -> torch.Tensor:
    """The rates of all words by one forward derivative; attention must be eager."""
    weights, (prompt, *responses) = dict(model.named_parameters()), pair
    chosen, rejected = (torch.autograd.grad(_log_prob(model, prompt, y), list(weights.values())) for y in responses)
    direction = {name: -slope * (a - b) for name, a, b in zip(weights, chosen, rejected, strict=True)}
    options = {"input_ids": torch.tensor([[*prompt]]), "use_cache": False, "logits_to_keep": 1}

    def log_probs(w: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, w, kwargs=options).logits[0, -1].log_softmax(-1)

    return jvp(log_probs, ({name: leaf.detach() for name, leaf in weights.items()},), (direction,))[1]


def _log_prob(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *response]])
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    return -functional.cross_entropy(model.get_output_embeddings()(states), torch.tensor(response), reduction="sum")
