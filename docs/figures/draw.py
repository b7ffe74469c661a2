"""Draws the manual's figures: ``python docs/figures/draw.py`` writes them beside this file.

A test compares the files with what this script draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

INK, FAINT, PAPER = "#1e293b", "#94a3b8", "#ffffff"
BLUE, ORANGE, GREEN, VIOLET = "#2563eb", "#c2410c", "#15803d", "#7c3aed"
TINTS = {BLUE: "#dbeafe", ORANGE: "#ffedd5", GREEN: "#dcfce7", VIOLET: "#ede9fe", FAINT: "#f1f5f9"}
HEADS = (BLUE, ORANGE, GREEN, VIOLET)


class Figure:
    """An SVG of a fixed size; coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, color: str = FAINT, *, fill: str = "", dash: bool = False):
        dashed = ' stroke-dasharray="4 3"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2" fill="{fill or TINTS[color]}" '
            f'stroke="{color}"{dashed}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 13,
        color: str = INK,
        at: str = "start",
        bold: bool = False,
        mono: bool = False,
    ):
        family = "ui-monospace, 'DejaVu Sans Mono', monospace" if mono else "'DejaVu Sans', Arial, sans-serif"
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-family="{family}" fill="{color}" '
            f'text-anchor="{at}"{weight}>{escape(words)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str = INK, *, dash: bool = False, arrow=False):
        dashed = ' stroke-dasharray="4 3"' if dash else ""
        head = ' marker-end="url(#tip)"' if arrow else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="1.3"{dashed}{head}/>'
        )

    def slots(self, x: float, y: float, labels: Sequence[object], color: str, *, w: float = 30, h: float = 26):
        """A row of slots; None is an unused one."""
        for place, label in enumerate(labels):
            if label is None:
                self.box(x + place * w, y, w, h, FAINT, fill=PAPER, dash=True)
            else:
                self.box(x + place * w, y, w, h, color)
                self.text(x + (place + 0.5) * w, y + h / 2 + 4, str(label), size=11, at="middle", mono=True)

    def __str__(self) -> str:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                tip,
                f'<rect width="{self.width}" height="{self.height}" fill="{PAPER}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def block() -> Figure:
    figure = Figure(700, 230, "A block of four slots and what each slot holds")
    figure.text(20, 28, "Block 5 of the pool: block_size = 4 slots of one KV head", bold=True)
    names = ("k_cache[5]", "v_cache[5]", "positions[5]", "scores[5]")
    notes = (
        "D numbers a slot",
        "Dv numbers a slot",
        "int32: the token's place in the text",
        "float32: what eviction ranks by",
    )
    cells = (("k₈", "k₉", "k₁₀", None), ("v₈", "v₉", "v₁₀", None), (8, 9, 10, None), ("0.3", "1.2", "0.1", None))
    for row, (name, note, values) in enumerate(zip(names, notes, cells, strict=True)):
        y = 48 + row * 36
        figure.text(20, y + 18, name, mono=True)
        figure.slots(150, y, values, (BLUE, BLUE, GREEN, ORANGE)[row], w=56)
        figure.text(395, y + 18, note, size=12)
    figure.text(178, 210, "slot 0", size=11, at="middle", color=FAINT)
    figure.text(346, 210, "slot 3, unused", size=11, at="middle", color=FAINT)
    return figure


def lists() -> Figure:
    figure = Figure(760, 360, "Block tables point from the heads of a row into one pool of blocks")
    figure.text(20, 28, "One row (sequence), one layer, three KV heads", bold=True)
    figure.text(20, 58, "block_tables[0]", mono=True, size=12)
    figure.text(208, 58, "seq_lens[0]", mono=True, size=12)
    figure.text(330, 58, "list: the head's blocks in order", size=12)
    tables = ((7, 2, 5), (0, 4, None), (3, None, None))
    lens = (10, 6, 3)
    for head, (table, length) in enumerate(zip(tables, lens, strict=True)):
        y, color = 72 + head * 46, HEADS[head]
        figure.text(20, y + 18, f"head {head}", size=12)
        figure.slots(76, y, table, color)
        figure.text(240, y + 18, str(length), mono=True, at="middle")
        for place, number in enumerate(table):
            if number is None:
                continue
            filled = min(4, length - 4 * place)
            x = 330 + place * 130
            figure.slots(x, y, ["·"] * filled + [None] * (4 - filled), color)
            figure.text(x, y + 39, f"block {number}", size=10, color=FAINT)
    figure.text(20, 246, "The pool: one tensor for all rows, layers and heads", bold=True)
    owner = {7: 0, 2: 0, 5: 0, 0: 1, 4: 1, 3: 2}
    for number in range(10):
        x = 20 + number * 72
        color = HEADS[owner[number]] if number in owner else FAINT
        figure.box(x, 262, 64, 30, color, dash=number not in owner, fill="" if number in owner else PAPER)
        figure.text(x + 32, 282, str(number), at="middle", mono=True)
        figure.text(x + 32, 310, f"head {owner[number]}" if number in owner else "free", size=11, at="middle")
    figure.text(20, 344, "A free block can go to any head of any row next.", size=12)
    return figure


def ragged() -> Figure:
    figure = Figure(760, 300, "Equal heads beside ragged heads with the same number of blocks")
    for x, title, lengths, note in (
        (20, "Equal heads", (3, 3, 3, 3), "every head keeps the same number of blocks"),
        (400, "Ragged heads", (6, 1, 3, 2), "heads compete: same total, other shares"),
    ):
        figure.text(x, 28, title, bold=True)
        figure.text(x, 50, note, size=12)
        for head, count in enumerate(lengths):
            y = 68 + head * 44
            figure.text(x, y + 20, f"head {head}", size=12)
            for place in range(count):
                figure.box(x + 58 + place * 46, y, 42, 28, HEADS[head])
        figure.text(x + 58, 262, f"{sum(lengths)} blocks", size=12)
    figure.line(375, 20, 375, 270, FAINT, dash=True)
    figure.text(20, 288, "A head that looks at few tokens gives its blocks to a head that needs many.", size=12)
    return figure


def evict() -> Figure:
    figure = Figure(760, 330, "Eviction: select, compact, give the last blocks back")
    positions, scores = list(range(12)), (9, 1, 2, 7, 0, 1, 8, 1, 2, 5, 6, 9)
    keep = [place in (0, 3, 6, 9, 10, 11) for place in positions]
    rows = (
        ("positions", positions),
        ("scores", scores),
        ("keep", ["✓" if kept else "" for kept in keep]),
    )
    figure.text(20, 28, "1. select_blocks marks the slots that survive", bold=True)
    for row, (name, values) in enumerate(rows):
        y = 42 + row * 32
        figure.text(20, y + 18, name, mono=True, size=12)
        for place, value in enumerate(values):
            figure.slots(120 + place * 44 + place // 4 * 12, y, [value], BLUE if keep[place] else FAINT, w=44)
    figure.text(20, 172, "2. compact moves them to the front, in order", bold=True)
    kept = [position for position, stays in zip(positions, keep, strict=True) if stays]
    figure.text(20, 206, "positions", mono=True, size=12)
    for place in range(12):
        value = kept[place] if place < len(kept) else None
        figure.slots(120 + place * 44 + place // 4 * 12, 188, [value], BLUE, w=44)
    for number in range(3):
        figure.text(
            120 + number * 188, 232, ("block 7", "block 2", "block 5: free again")[number], size=11, color=FAINT
        )
    figure.text(20, 270, "3. seq_lens goes from 12 to 6; block 5 returns to the pool", bold=True)
    figure.text(
        20,
        298,
        "Slots are counted in the list (0 to 5); positions are counted in the text (0, 3, 6, 9, 10, 11).",
        size=12,
    )
    figure.text(20, 318, "The next token stands in slot 6 and at position 12.", size=12)
    return figure


def drafts() -> Figure:
    figure = Figure(760, 260, "A draft of four tokens, two of them accepted, the third corrected")
    figure.text(20, 28, "One pass over the last token and four drafted ones", bold=True)
    for place, word in enumerate(("the", "cat", "sat", "in", "a")):
        color = (FAINT, GREEN, GREEN, ORANGE, FAINT)[place]
        figure.box(120 + place * 100, 48, 84, 32, color)
        figure.text(162 + place * 100, 69, word, at="middle")
    figure.text(20, 69, "given", size=12)
    figure.text(20, 129, "target says", size=12)
    for place, word in enumerate(("cat", "sat", "on", "the", "mat")):
        used = place < 3
        figure.box(120 + place * 100, 108, 84, 32, BLUE if used else FAINT, fill="" if used else PAPER, dash=not used)
        figure.text(162 + place * 100, 129, word, at="middle", color=INK if used else FAINT)
        figure.line(162 + place * 100, 82, 162 + place * 100, 105, FAINT, arrow=True)
    figure.text(20, 186, "emitted", size=12)
    for place, word in enumerate(("cat", "sat", "on")):
        figure.box(120 + place * 100, 166, 84, 32, GREEN if place < 2 else BLUE)
        figure.text(162 + place * 100, 187, word, at="middle")
        verdict, color = (("accepted", GREEN), ("accepted", GREEN), ("corrected", BLUE))[place]
        figure.text(162 + place * 100, 213, verdict, size=11, at="middle", color=color)
    figure.text(430, 187, "num_accepted = 2, three tokens from one pass", size=12)
    figure.text(20, 244, "The emitted tokens are those that the target would have produced alone.", size=12)
    return figure


def tree() -> Figure:
    figure = Figure(760, 250, "A tree of drafts and its mask")
    figure.text(20, 28, "A tree: parents = [-1, 0, 0, 1, 1, 2]", bold=True)
    at = {0: (60, 130), 1: (170, 80), 2: (170, 180), 3: (290, 55), 4: (290, 110), 5: (290, 180)}
    parents = (-1, 0, 0, 1, 1, 2)
    for node, parent in enumerate(parents):
        if parent >= 0:
            figure.line(at[parent][0] + 18, at[parent][1], at[node][0] - 20, at[node][1], FAINT, arrow=True)
    for node, (x, y) in at.items():
        figure.box(x - 18, y - 15, 36, 30, GREEN if node in (0, 1, 4) else FAINT)
        figure.text(x, y + 5, str(node), at="middle", mono=True)
    figure.text(
        20, 232, "Green: the accepted path 0, 1, 4. Node 0 is the last token that was accepted before.", size=12
    )
    figure.text(430, 28, "tree_mask: node (row) sees", bold=True)
    for row in range(6):
        seen, node = set(), row
        while node >= 0:
            seen.add(node)
            node = parents[node]
        figure.text(440, 66 + row * 25, str(row), size=11, at="end", mono=True)
        for column in range(6):
            inside = column in seen
            figure.box(
                452 + column * 26, 50 + row * 25, 24, 23, BLUE if inside else FAINT, fill="" if inside else PAPER
            )
    return figure


def causal() -> Figure:
    figure = Figure(760, 250, "Causal masks are aligned to the bottom right, and what a window is")
    for x, title, visible in (
        (20, "causal, Sq = 3, Sk = 5", lambda i, j: j <= i + 2),
        (280, "causal, window_left = 1", lambda i, j: 0 <= i + 2 - j <= 1),
        (540, "no mask", lambda i, j: True),
    ):
        figure.text(x, 28, title, bold=True)
        figure.text(x + 40, 54, "keys 0 to 4", size=11, color=FAINT)
        for i in range(3):
            figure.text(x + 30, 82 + i * 34, f"q{i}", size=11, at="end", mono=True)
            for j in range(5):
                seen = visible(i, j)
                figure.box(x + 40 + j * 34, 62 + i * 34, 31, 31, BLUE if seen else FAINT, fill="" if seen else PAPER)
    figure.text(20, 200, "The last query always sees the last key: query i stands at position i + Sk - Sq.", size=12)
    figure.text(20, 222, "window_left = 1 lets a query see its own position and one before it.", size=12)
    return figure


Tensor = tuple[str, str, str]
"""A name, its shape such as "B, Sq, Hq, D", and what happens to it: "in", "out" or "changed"."""


def shapes(operator: str, tensors: Sequence[Tensor]) -> Figure:
    """Inputs to the left of an operator, outputs to the right, and what is changed in place below it."""
    groups = {kind: [tensor for tensor in tensors if tensor[2] == kind] for kind in ("in", "out", "changed")}
    rows = max(len(groups["in"]), len(groups["out"]), 1)
    top, step = 16, 66
    height = top + rows * step + (step + 14 if groups["changed"] else 0)
    figure = Figure(760, height, f"Shapes of {operator}")
    middle = top + rows * step / 2 - 8
    figure.box(290, middle - 20, 190, 40, VIOLET)
    figure.text(385, middle + 5, operator, at="middle", bold=True, mono=True, size=12 if len(operator) < 22 else 11)
    for kind, x in (("in", 16), ("out", 530)):
        offset = (rows - len(groups[kind])) * step / 2
        for place, (name, shape, _) in enumerate(groups[kind]):
            _tensor(figure, x, top + offset + place * step, name, shape, BLUE if kind == "in" else GREEN)
    figure.line(258, middle, 284, middle, arrow=True)
    if groups["out"]:
        figure.line(482, middle, 516, middle, arrow=True)
    for place, (name, shape, _) in enumerate(groups["changed"]):
        _tensor(figure, 16 + place * 240, top + rows * step + 14, name, shape, ORANGE)
    if groups["changed"]:
        figure.line(385, middle + 22, 385, top + rows * step + 2, arrow=True)
        figure.text(395, top + rows * step - 4, "written in place", size=11, color=ORANGE)
    return figure


def _tensor(figure: Figure, x: float, y: float, name: str, shape: str, color: str) -> None:
    """A glyph whose form says how many dimensions there are, with the name and the shape beside it."""
    rank = len(shape.split(","))
    for layer in range(min(max(rank - 2, 0), 2), -1, -1):
        figure.box(x + 5 * layer, y + 12 - 5 * layer, 34 if rank > 1 else 12, 34, color)
    figure.text(x + 56, y + 22, name, bold=True, size=12, mono=True)
    figure.text(x + 56, y + 40, f"[{shape}]", size=11, mono=True)


OPERATORS: dict[str, Sequence[Tensor]] = {
    "flash_attention": (
        ("q", "B, Sq, Hq, D", "in"),
        ("k", "B, Sk, Hkv, D", "in"),
        ("v", "B, Sk, Hkv, Dv", "in"),
        ("out", "B, Sq, Hq, Dv", "out"),
        ("lse", "B, Hq, Sq", "out"),
    ),
    "flash_attention_varlen": (
        ("q", "Tq, Hq, D", "in"),
        ("k", "Tk, Hkv, D", "in"),
        ("v", "Tk, Hkv, Dv", "in"),
        ("cu_seqlens_q, _k", "B + 1", "in"),
        ("out", "Tq, Hq, Dv", "out"),
        ("lse", "Hq, Tq", "out"),
    ),
    "merge_attention": (
        ("out_a, out_b", "B, S, H, Dv", "in"),
        ("lse_a, lse_b", "B, H, S", "in"),
        ("out", "B, S, H, Dv", "out"),
        ("lse", "B, H, S", "out"),
    ),
    "attention_scores": (
        ("q", "B, Sq, Hq, D", "in"),
        ("k", "B, Sk, Hkv, D", "in"),
        ("lse", "B, Hq, Sq", "in"),
        ("scores", "B, Hkv, Sk", "out"),
    ),
    "paged_append": (
        ("k", "B, T, Hkv, D", "in"),
        ("v", "B, T, Hkv, Dv", "in"),
        ("block_tables", "B, Hkv, max_blocks", "in"),
        ("seq_lens", "B, Hkv", "in"),
        ("k_cache, v_cache", "blocks, size, D", "changed"),
        ("positions", "blocks, size", "changed"),
        ("scores", "blocks, size", "changed"),
    ),
    "paged_attention": (
        ("q", "B, T, Hq, D", "in"),
        ("k_cache, v_cache", "blocks, size, D", "in"),
        ("block_tables", "B, Hkv, max_blocks", "in"),
        ("seq_lens", "B, Hkv", "in"),
        ("out", "B, T, Hq, Dv", "out"),
        ("lse", "B, Hq, T", "out"),
        ("scores (optional)", "blocks, size", "changed"),
    ),
    "paged_latent_attention": (
        ("q", "B, T, Hq, D", "in"),
        ("cache", "blocks, size, D", "in"),
        ("block_tables", "B, Hkv, max_blocks", "in"),
        ("seq_lens", "B, Hkv", "in"),
        ("out", "B, T, Hq, value_dim", "out"),
        ("lse", "B, Hq, T", "out"),
    ),
    "paged_schedule": (
        ("seq_lens", "B, Hkv", "in"),
        ("schedule", "2 + lists + programs", "out"),
    ),
    "copy_blocks": (
        ("source", "N", "in"),
        ("target", "N", "in"),
        ("k_cache, v_cache", "blocks, size, D", "changed"),
        ("positions", "blocks, size", "changed"),
        ("scores", "blocks, size", "changed"),
    ),
    "select_blocks": (
        ("scores", "blocks, size", "in"),
        ("block_tables", "B, Hkv, max_blocks", "in"),
        ("seq_lens", "B, Hkv", "in"),
        ("budget", "B", "in"),
        ("new_lens", "B, Hkv", "out"),
        ("keep", "B, Hkv, max_blocks·size", "out"),
    ),
    "compact": (
        ("block_tables", "B, Hkv, max_blocks", "in"),
        ("keep", "B, Hkv, max_blocks·size", "in"),
        ("freed", "B, Hkv", "out"),
        ("k_cache, v_cache", "blocks, size, D", "changed"),
        ("positions, scores", "blocks, size", "changed"),
        ("seq_lens", "B, Hkv", "changed"),
    ),
    "verify_draft": (
        ("target_logits", "B, T + 1, V", "in"),
        ("draft_tokens", "B, T", "in"),
        ("draft_probs (opt.)", "B, T, V", "in"),
        ("tokens", "B, T + 1", "out"),
        ("num_accepted", "B", "out"),
    ),
    "verify_tree": (
        ("target_logits", "B, N, V", "in"),
        ("draft_tokens", "B, N", "in"),
        ("parents", "B, N", "in"),
        ("path", "B, N", "out"),
        ("tokens", "B, N", "out"),
        ("num_accepted", "B", "out"),
    ),
    "prompt_lookup": (
        ("tokens", "B, L", "in"),
        ("lens", "B", "in"),
        ("draft_tokens", "B, num_draft", "out"),
        ("draft_lens", "B", "out"),
    ),
    "process_logits": (
        ("logits", "B, T, V", "in"),
        ("context", "B, L", "in"),
        ("logits", "B, T, V", "out"),
    ),
}


def figures() -> dict[str, str]:
    """Every figure's file name and content."""
    drawn = {f.__name__: f() for f in (block, lists, ragged, evict, drafts, tree, causal)}
    drawn |= {f"op-{name}": shapes(name, tensors) for name, tensors in OPERATORS.items()}
    return {f"{name}.svg": str(figure) for name, figure in drawn.items()}


if __name__ == "__main__":
    for name, content in figures().items():
        Path(__file__).with_name(name).write_text(content, encoding="utf-8")
