"""Cases of the machine for PTX (see ``machine_cases.py``): verification of drafts, and where they come from."""

import torch
from machine_call import Call, case

OPS = torch.ops.kvops
VOCABULARY = 1000


def _logits(drafts=3):
    logits = torch.randn(2, drafts + 1, VOCABULARY).half() * 3
    tokens = logits[:, :drafts].argmax(-1)
    tokens[1, 1] = 5
    return logits, tokens


def _upto(accepted_at):
    """Tokens beyond the last accepted one are not promised."""

    def compare(results):
        accepted = results[accepted_at]
        return tuple(
            result if result.dim() < 2 else result.masked_fill(torch.arange(result.shape[1]) > accepted[:, None], -1)
            for result in results
        )

    return compare


SAMPLING = {"temperature": torch.tensor([0.8, 1.1]), "seed": torch.tensor([3, 4])}


def _verify(**options):
    from kvops.kernels.verify_draft import verify_draft as launch

    return Call(launch, OPS.verify_draft, _logits(), options, compare=_upto(1))


@case
def verify_greedy():
    return _verify()


@case
def verify_sampled():
    probabilities = torch.softmax(torch.randn(2, 3, VOCABULARY), -1)
    options = {"draft_lens": torch.tensor([3, 2], dtype=torch.int32), "step": torch.tensor([1, 2])}
    return _verify(draft_probs=probabilities, **options, **SAMPLING)


@case
def verify_block():
    return _verify(draft_probs=torch.softmax(torch.randn(2, 3, VOCABULARY), -1), method="block", **SAMPLING)


def _tree(**options):
    from kvops.kernels.verify_tree import verify_tree as launch

    logits = _logits()[0]
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]], dtype=torch.int32)
    tokens = torch.randint(VOCABULARY, (2, 4))
    tokens[0, 1] = logits[0, 0].argmax()
    return Call(launch, OPS.verify_tree, (logits, tokens, parents), options, compare=_upto(2))


@case
def verify_tree_greedy():
    return _tree()


@case
def verify_tree_sampled():
    return _tree(step=torch.tensor([1, 2]), **SAMPLING)


@case
def verify_tree_probabilities():
    return _tree(draft_probs=torch.softmax(torch.randn(2, 4, VOCABULARY), -1), **SAMPLING)


@case
def prompt_lookup():
    from kvops.kernels.prompt_lookup import prompt_lookup as launch

    tokens = torch.randint(4, (2, 300))
    lens = torch.tensor([300, 77], dtype=torch.int32)

    def compare(results):
        drafts, count = results
        return drafts.masked_fill(torch.arange(5) >= count[:, None], -1), count

    return Call(launch, OPS.prompt_lookup, (tokens, lens), {"num_draft": 5}, compare=compare)
