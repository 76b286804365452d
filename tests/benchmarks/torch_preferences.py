"""Peers of the preference benchmark in torch: the CHES of arXiv 2410.08847's code, and steps of DPO.

A pair is three lists of token ids: prompt, chosen, rejected. Models are those of transformers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

__all__ = ["Pair", "Step", "ches_batched", "ches_one_by_one", "dpo_log_probs", "plain_dpo", "trl_dpo"]

Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]
Step = Callable[[], torch.Tensor]
"""Takes a step of the optimiser and returns the loss."""


@torch.no_grad()
def ches_one_by_one(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """As the authors' script goes about it: one pair at a time, two passes, logits and all hidden states returned.

    The sums are those of Definition 2 of the paper; the script's own hold one state more, that after the last token.
    """
    scores, device = [], model.device
    for prompt, chosen, rejected in pairs:
        sums = []
        for response in (chosen, rejected):
            ids = torch.tensor([[*prompt, *response]], device=device)
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            sums.append(states[len(prompt) - 1 : -1].sum(0))
        scores.append((sums[0] * sums[1]).sum() - torch.norm(sums[0]) ** 2)
    return torch.stack(scores)


@torch.no_grad()
def ches_batched(model: Any, pairs: Sequence[Pair], *, batch: int) -> torch.Tensor:
    """What the script could do: padded batches through the decoder alone, no logits, sums in float32."""
    scores = []
    for start in range(0, len(pairs), batch):
        ids, attended, answered = padded(pairs[start : start + batch], device=model.device)
        options = {} if bool(attended.all()) else {"attention_mask": attended}
        states = model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state
        # The state at a token predicts the next one.
        sums = torch.einsum("btd,bt->bd", states[:, :-1].float(), answered[:, 1:].float())
        chosen, rejected = sums.chunk(2)
        scores.append((chosen * rejected).sum(-1) - (chosen**2).sum(-1))
    return torch.cat(scores)


def padded(pairs: Sequence[Pair], *, device: Any = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask of tokens and mask of responses, padded on the right: the chosen of all pairs, then the rejected."""
    rows = [(p, y) for k in (1, 2) for p, y in ((pair[0], pair[k]) for pair in pairs)]
    longest = max(len(p) + len(y) for p, y in rows)
    ids, answered = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    attended = torch.zeros_like(ids)
    for i, (p, y) in enumerate(rows):
        ids[i, : len(p) + len(y)] = torch.tensor([*p, *y])
        attended[i, : len(p) + len(y)] = 1
        answered[i, len(p) : len(p) + len(y)] = 1
    return ids.to(device), attended.to(device), answered.to(device)


def dpo_log_probs(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """``[2, n]``, differentiable; only states that predict a token of a response meet the unembedding."""
    ids, attended, answered = padded(pairs, device=model.device)
    options = {} if bool(attended.all()) else {"attention_mask": attended}
    states = model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state[:, :-1]
    kept, targets = answered[:, 1:].bool(), ids[:, 1:]
    logits = model.get_output_embeddings()(states[kept])
    log_probs = -functional.cross_entropy(logits.float(), targets[kept], reduction="none")
    rows = kept.nonzero()[:, 0]
    return torch.zeros(len(ids), device=ids.device).index_add(0, rows, log_probs).reshape(2, len(pairs))


def plain_dpo(
    model: Any, pairs: Sequence[Pair], *, beta: float, learning_rate: float, eps: float
) -> tuple[Step, torch.optim.Optimizer]:
    """DPO by hand, padded, AdamW fused, log-probabilities of the reference computed once, before."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, eps=eps, weight_decay=0.0, fused=True)
    with torch.no_grad():
        reference = dpo_log_probs(model, pairs)

    def step() -> torch.Tensor:
        model.train()
        ratios = dpo_log_probs(model, pairs) - reference
        loss = -functional.logsigmoid(beta * (ratios[0] - ratios[1])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, optimizer


def trl_dpo(
    model: Any, pairs: Sequence[Pair], folder: str, *, beta: float, learning_rate: float, eps: float
) -> tuple[Step, torch.optim.Optimizer]:
    """TRL's ``DPOTrainer``: its collator, its reference log-probabilities, its ``training_step``, its optimiser.

    What ``train`` adds (data loader, clipping, schedule, logging) is left out.
    """
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    data = {"prompt": [], "chosen": [], "rejected": []}
    for pair in pairs:
        for name, ids in zip(data, pair, strict=True):
            data[name].append("".join(f"<{i}>" for i in ids))
    options: dict[str, Any] = {"per_device_train_batch_size": len(pairs), "precompute_ref_log_probs": True}
    options |= {"beta": beta, "learning_rate": learning_rate, "adam_epsilon": eps, "weight_decay": 0.0}
    options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "max_length": None}
    args = DPOConfig(output_dir=folder, disable_tqdm=True, save_strategy="no", **options)
    tokenizer = _tokenizer(model.config.vocab_size)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
    ids, _, answered = padded(pairs)
    assert torch.equal(inputs["input_ids"] * inputs["attention_mask"], ids), "TRL reads other tokens"
    assert torch.equal(inputs["completion_mask"], answered), "TRL sees other responses"
    model, optimizer = trainer.model, trainer.create_optimizer()
    assert model is not None
    trainer.current_gradient_accumulation_steps = 1

    def step() -> torch.Tensor:
        loss = trainer.training_step(model, inputs)
        optimizer.step()
        model.zero_grad()
        return loss.detach()

    return step, optimizer


def _tokenizer(words: int) -> Any:
    """Id i is the text ``<i>``; 0 ends and pads."""
    import tokenizers
    import transformers

    model = tokenizers.models.WordLevel({f"<{i}>": i for i in range(words)}, unk_token="<0>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<[0-9]+>"), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<0>", pad_token="<0>")
