"""kvops in vLLM: the parts that need no vLLM. Those that run it stand in test_vllm_engine.py."""

import random
from types import SimpleNamespace

import pytest
import torch
from no_sync import SynchronisationError, _Functions

import kvops
from kvops import checks
from kvops.generation.passes import new_cache, read_prompt
from kvops.integrations.vllm.compressed import CompressedLayers
from kvops.integrations.vllm.judge import Judge, served
from kvops.integrations.vllm.options import Options
from kvops.integrations.vllm.rule import Rule
from kvops.integrations.vllm.step import Slots
from kvops.policies import POLICIES, Compression


def most_held(rule: Rule, tokens: int, in_flight: int) -> int:
    """The most pages at once over every size that a step can have, one token after the other."""
    return max(
        rule.held(computed, min(computed + step, tokens))
        for computed in range(tokens)
        for step in range(1, in_flight + 1)
    )


RULES = [(ratio, slack, chunk) for ratio in (1.5, 4, 12.5) for slack in (0, 3) for chunk in (1, 2, 5)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protect_last", [0, 5, 32])
def test_the_peak_of_a_request_is_what_it_holds_at_most(rule, protect_last):
    rule = Rule(*rule, 4, 4, protect_last)
    for tokens in (1, 3, 17, 64, 65, 130):
        for in_flight in (1, 7, 90):
            assert rule.peak(tokens, in_flight) == most_held(rule, tokens, in_flight), (tokens, in_flight)
    assert rule.peak(0, 8) == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protect", [(0, 0), (4, 32), (9, 7)])
def test_a_request_holds_its_share_and_a_constant(rule, protect):
    rule = Rule(*rule, 4, *protect)
    least = rule.slack + rule.columns(protect[0]) + rule.columns(protect[1])
    for tokens in range(1, 500):
        share = rule.columns(tokens) / rule.ratio
        assert rule.held(tokens, tokens) <= max(share, least) + rule.slack + rule.chunk + 1, tokens
        assert rule.held(tokens, tokens) >= min(rule.columns(tokens), int(share)), tokens


@pytest.mark.parametrize("rule", RULES)
def test_columns_that_stay_do_not_depend_on_when_they_are_compacted(rule):
    rule = Rule(*rule, 4, 4, 8)
    for before in range(0, 60, 7):
        for after in range(before, 61):
            emptied = {*rule.emptied(0, before), *rule.emptied(before, after)}
            assert emptied == set(rule.emptied(0, after))
            assert len(emptied) == after - rule.keep(after)
    olds = [rule.old(computed) for computed in range(400)]
    assert olds == sorted(olds)
    assert all(rule.emptied(0, old) for old in olds if old)
    assert rule.stays(0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"ratio": 0.5}, ValueError, "ratio: expected at least 1"),
        ({"ratio": "4"}, TypeError, "ratio: expected a number, got '4'"),
        ({"ratio": True}, TypeError, "ratio: expected a number, got True"),
        ({"policy": "best"}, ValueError, "policy: expected one of"),
        ({"policy_options": {"window": 3}}, TypeError, "policy_options: expected some of .*observe.* for standout"),
        ({"policy_options": [3]}, TypeError, "policy_options: expected names and values"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"slack": -1}, ValueError, "slack"),
        ({"protect_last": -1}, ValueError, "protect_last"),
        ({"check": 1}, TypeError, "check: expected true or false, got 1"),
        ({"ratios": 4, "x": 1}, ValueError, 'expected some of ratio, policy, .* in "kvops", got ratios, x'),
        ("ratio=4", TypeError, "additional_config: expected"),
    ],
)
def test_an_option_that_is_wrong_is_named(given, error, message):
    with pytest.raises(error, match=message):
        Options.of({"kvops": given})


def test_options_are_found_in_vllms_own_place():
    assert not Options.of({}).compresses
    assert not Options.of({"other": {"ratio": 4}}).compresses
    options = Options.of({"kvops": {"ratio": 8, "policy": "kv-compress", "policy_options": {"observe": 8}}})
    assert options.compresses
    assert options.make_policy().observe == 8
    assert "ratio=8" in str(options)
    assert "policy=kv-compress" in str(options)


def test_padding_of_a_step_is_written_nowhere():
    slots = Slots.of(torch.tensor([0, 31, 32, 100, -1]), 32)
    assert slots.lens.tolist() == [1, 32, 1, 5, 0]
    assert slots.pages[:4, 0].tolist() == [0, 0, 1, 3]


class PretendEngine:
    """vLLM's scheduler and a model of random keys, in the size of a test: what is freed is given away in the same step.

    The worker's side is the real one, and its check holds every attention to the kept tokens. ``numbered``: requests
    have numbers as in Model Runner V2, which others had before.
    """

    def __init__(
        self,
        pages: int,
        options: Options,
        *,
        layers=2,
        kv_heads=2,
        group=2,
        size=4,
        head_dim=8,
        seed=0,
        numbered=False,
    ):
        self.draw, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.cache = torch.full((layers, pages + 1, kv_heads, size, 2 * head_dim), torch.nan)
        impl = SimpleNamespace(num_heads=kv_heads * group, num_kv_heads=kv_heads, head_size=head_dim)
        named = {f"{n}": SimpleNamespace(impl=impl, kv_cache=cache) for n, cache in enumerate(self.cache)}
        self.rule = Rule.of(options, size)
        self.layers = CompressedLayers(named, self.rule, options)
        self.free = list(range(1, pages + 1))
        self.draw.shuffle(self.free)
        self.heads, self.size, self.head_dim = (kv_heads * group, kv_heads, kv_heads), size, head_dim
        self.tables, self.old = {}, {}
        self.numbered, self.numbers = numbered, {}

    def pages_of(self, request, computed, tokens):
        """The request's table with pages for ``tokens``, or None; what ``computed`` tokens free is free from now on."""
        table, old = self.tables.setdefault(request, []), self.rule.old(computed)
        self.numbers.setdefault(request, min({*range(1, 99)} - {*self.numbers.values()}))
        freed = self.rule.emptied(self.old.get(request, 0), old)
        wanted = self.rule.columns(tokens) - len(table)
        if wanted > len(self.free) + len(freed):
            return None
        self.free += [table[column] for column in freed]  # the worker is not told: its table keeps the pages
        self.old[request] = old
        table += [self.free.pop(0) for _ in range(wanted)]
        return table

    def drop(self, request):
        self.numbers.pop(request, None)
        emptied = set(self.rule.emptied(0, self.old.pop(request, 0)))
        self.free += [page for column, page in enumerate(self.tables.pop(request, [])) if column not in emptied]

    def on_device(self, tensor):
        return tensor

    def random(self, tokens):
        """Queries, keys and values of each layer, ``[tokens, heads, head_dim]``."""
        return [
            [torch.randn(tokens, heads, self.head_dim, generator=self.generator) for heads in self.heads]
            for _ in self.cache
        ]

    def step(self, work, vectors=None, **options):
        """``work``: (request, computed, new tokens) of those that run, their pages given.

        ``vectors``: of :meth:`random`, of the new tokens. Returns the metadata of the step.
        """
        starts = [0]
        for _, _, new in work:
            starts.append(starts[-1] + new)
        tokens = [computed + new for _, computed, new in work]
        width = max(map(self.rule.columns, tokens))
        table = torch.tensor(
            [(self.tables[request] + [0] * width)[:width] for request, _, _ in work], dtype=torch.int32
        )
        at = torch.cat([torch.arange(computed, computed + new) for _, computed, new in work])
        row = torch.repeat_interleave(torch.arange(len(work)), torch.tensor([new for _, _, new in work]))
        slots = table[row, at // self.size].long() * self.size + at % self.size
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        device_starts, slots = self.on_device(cu_seqlens), Slots.of(self.on_device(slots), self.size)
        numbers = torch.tensor([self.numbers[request] for request, _, _ in work]) if self.numbered else None
        step = self.layers.build(
            starts[-1], cu_seqlens, device_starts, torch.tensor(tokens), self.on_device(table), slots, numbers
        )
        vectors = self.random(starts[-1]) if vectors is None else vectors
        for name, cache, (q, k, v) in zip(self.layers.number, self.cache, vectors, strict=True):
            output = torch.full_like(q, torch.nan)
            parts = cache.transpose(1, 2).split(self.head_dim, -1)
            plain = {"scale": 1.0, "softcap": 0.0, "sinks": None}
            self.layers.forward(name, q, k, v, parts, step, output, plain | options)
            assert not output.isnan().any()
        return step


def run_requests(engine, lengths, most=6):
    """Requests of these lengths, some at once, in steps of random sizes; some are preempted, some aborted."""
    waiting = [(number, length) for number, length in enumerate(lengths)]
    computed, draw = {}, engine.draw
    running = []
    while waiting or running:
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
            computed[running[-1][0]] = 0
        work = []
        for request, length in list(running):
            new = min(draw.choice([1, 1, 1, 3, 9, 30]), length - computed[request])
            if draw.random() < 0.1 or (request, length) not in running:
                continue
            if engine.pages_of(request, computed[request], computed[request] + new) is None:
                if not work and request == running[0][0]:  # alone and still too long: give all others' pages back
                    for other, size in running[1:]:
                        engine.drop(other)
                        waiting.insert(0, (other, size))
                    running[1:] = []
                continue
            work.append((request, computed[request], new))
        if work:
            engine.step(work)
        for request, _, new in work:
            computed[request] += new
        for request, length in list(running):
            if computed[request] == length or draw.random() < 0.01:
                engine.drop(request)
                running.remove((request, length))


@pytest.mark.parametrize("policy", ["kv-compress", "standout", "snapkv", "knorm", "h2o", "ada-kv", "pyramid-kv"])
@pytest.mark.parametrize(("ratio", "chunk", "slack"), [(4, 4, 0), (1.5, 3, 2), (8, 1, 1)])
def test_every_attention_is_over_the_tokens_that_were_kept(policy, ratio, chunk, slack):
    options = Options(ratio=ratio, policy=policy, chunk=chunk, slack=slack, protect_first=2, protect_last=5, check=True)
    engine = PretendEngine(60, options)
    run_requests(engine, [engine.draw.randrange(1, 150) for _ in range(12)])
    assert len(engine.free) == 60
    assert engine.layers.cells.compactions > 10
    assert engine.layers.check.count > 300
    assert engine.layers.check.worst < 2e-5


@pytest.mark.parametrize("ratio", [2, 8])
def test_requests_may_be_known_by_numbers_that_others_had_before(ratio):
    options = Options(ratio=ratio, policy="snapkv", protect_first=2, protect_last=5, check=True)
    engine = PretendEngine(60, options, numbered=True)
    run_requests(engine, [engine.draw.randrange(1, 150) for _ in range(12)])
    assert len(engine.free) == 60
    assert engine.layers.cells.compactions > 10
    assert engine.layers.check.worst < 2e-5


class OnDevice(torch.Tensor):
    """A tensor whose data the host must not read. Whatever is computed from it is one, too."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in _Functions.FORBIDDEN:
            raise SynchronisationError(f"calls {function.__name__}")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_host_waits_for_nothing_of_the_device(monkeypatch):
    """Where requests have numbers: neither for the tables of a step nor for a compaction."""
    monkeypatch.setattr(checks, "may_look", lambda tensor: False)  # as on a GPU
    monkeypatch.setattr(PretendEngine, "on_device", lambda self, tensor: tensor.as_subclass(OnDevice))
    options = Options(ratio=4, policy="standout", protect_last=8)
    for numbered in (True, False):
        engine = PretendEngine(60, options, numbered=numbered)
        cells = engine.layers.cells
        for name in ("k", "v", "positions", "scores", "_owner", "_place", "_kept"):
            setattr(cells, name, getattr(cells, name).as_subclass(OnDevice))

        def run(engine=engine):
            computed = dict.fromkeys("ab", 0)
            for new in ({"a": 70, "b": 83}, {"a": 1, "b": 1}, {"a": 49, "b": 2}, {"a": 1, "b": 30}):
                for request, tokens in new.items():
                    engine.pages_of(request, computed[request], computed[request] + tokens)
                engine.step([(request, computed[request], tokens) for request, tokens in new.items()])
                computed = {request: computed[request] + tokens for request, tokens in new.items()}

        if numbered:
            run()
            assert cells.compactions >= 4
        else:
            with pytest.raises(SynchronisationError, match="calls cpu"):
                run()


def test_heads_of_all_layers_share_what_stays():
    """A head that matters more holds more, in the pages of its request alone."""
    engine = PretendEngine(
        40, Options(ratio=4, policy="knorm", policy_options={"scope": "sequence"}, protect_last=4, slack=2, check=True)
    )
    engine.pages_of("a", 0, 120)
    engine.step([("a", 0, 120)])
    engine.pages_of("a", 120, 121)
    engine.step([("a", 120, 1)])
    kept = engine.layers.cells._kept[engine.tables["a"][0]]
    assert int(kept.sum()) == engine.rule.keep(engine.rule.old(120)) * 4
    assert kept.min() < kept.max()


def test_softcap_and_sinks_are_those_of_the_layer():
    options = Options(ratio=4, policy="snapkv", chunk=4, protect_last=4, check=True)
    engine = PretendEngine(40, options)
    engine.pages_of("a", 0, 100)
    engine.step([("a", 0, 100)], softcap=2.0, sinks=torch.randn(4))
    engine.pages_of("a", 100, 103)
    engine.step([("a", 100, 3)], softcap=2.0, sinks=torch.randn(4))
    assert engine.layers.check.count == 8
    assert engine.layers.check.worst < 2e-5


def test_alibi_counts_original_positions():
    options = Options(ratio=4, policy="snapkv", chunk=4, protect_last=4, check=True)
    engine = PretendEngine(40, options)
    slopes = {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.3])}
    engine.pages_of("a", 0, 100)
    engine.step([("a", 0, 100)], **slopes)
    engine.pages_of("a", 100, 103)
    engine.step([("a", 100, 3)], **slopes)
    assert engine.layers.check.count == 8
    assert engine.layers.check.worst < 2e-5


def test_one_call_attends_however_the_requests_of_a_step_differ(monkeypatch):
    """No Python for each request and layer: the calls of a step are those of its layers."""
    calls = []
    attend = kvops.paged_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape[0])
        return attend(*args, **kwargs)

    monkeypatch.setattr(kvops, "paged_attention", counted)
    engine = PretendEngine(80, Options(ratio=4, policy="snapkv", chunk=4, protect_last=4, check=True), layers=3)
    for name, tokens in (("a", 100), ("b", 7)):
        engine.pages_of(name, 0, tokens)
        engine.step([(name, 0, tokens)])
    calls.clear()
    for name, computed, new in (("a", 100, 1), ("b", 7, 40), ("c", 0, 3)):
        engine.pages_of(name, computed, computed + new)
    engine.step([("a", 100, 1), ("b", 7, 40), ("c", 0, 3)])
    assert calls == [44] * 3
    assert engine.layers.check.worst < 2e-5


def test_a_policy_that_needs_more_than_an_engine_keeps_is_refused():
    with pytest.raises(ValueError, match=r"policy: ExpectedAttention needs the .*, which vLLM does not keep"):
        Judge(POLICIES["expected-attention"](), 2)
    with pytest.raises(ValueError, match="policy: KVzip needs a prompt that is read twice"):
        Judge(POLICIES["kvzip"](), 2)
    assert set(served()) == {
        *("ada-kv", "defensive-kv", "h2o", "keydiff", "knorm", "kv-compress", "pyramid-kv", "snapkv", "standout"),
        "streaming",
    }


def test_scores_are_those_of_about_the_last_queries():
    judge = Judge(POLICIES["kv-compress"](observe=4), 2)
    assert (judge.reduce, judge.observe) == ("sumsq", 4)
    # of more queries than four the last four score, from 0
    torch.testing.assert_close(judge.decays(torch.tensor([0, 1, 4, 5])), torch.tensor([1, 0.75, 0.75**4, 0]))
    assert Judge(POLICIES["h2o"](), 2).decays(torch.tensor([5])) is None
    assert Judge(POLICIES["knorm"](), 2).reduce is None


class GivenVectors:
    """A decoder for our own loop whose queries, keys and values are given: of each layer, by position."""

    rope, embedding = None, SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, vectors):
        self.vectors = vectors
        (_, k, _) = vectors[0]
        self.config = SimpleNamespace(num_layers=len(vectors), num_kv_heads=k.shape[1], head_dim=k.shape[2])

    def options(self, layer):
        return {"window_left": -1, "scale": 1.0}

    def __call__(self, tokens, positions, attend):
        for layer, each in enumerate(self.vectors):
            attend(layer, *(part[positions[0].long()][None] for part in each))
        return torch.zeros(*tokens.shape, 1)


def kept_positions(positions, tables, lens):
    """The positions in each list of ``[L, Hkv, W]`` blocks and ``[L, Hkv]`` slots."""
    return [
        [positions[table.long()].flatten()[:length].tolist() for table, length in zip(*layer, strict=True)]
        for layer in zip(tables, lens, strict=True)
    ]


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("policy", served())
def test_the_same_tokens_are_kept_as_in_our_own_loop(policy, ratio):
    """In every head, after each chunk of a prompt, where both keep as many pages and read the same chunks."""
    given = {"observe": 8} if hasattr(POLICIES[policy], "observe") else {}
    options = Options(ratio=ratio, policy=policy, policy_options=given, protect_last=8, check=True)
    engine = PretendEngine(60, options, layers=3)
    rule, lists = engine.rule, 3 * 2
    vectors = engine.random(161)
    model = GivenVectors(vectors)
    cache = new_cache(model, max_batch=1, max_tokens=200, block_size=engine.size)
    tokens, ends = torch.zeros(1, 161, dtype=torch.int64), [40, 64, 112, 160]
    for start, end in zip([0, *ends], [*ends, 161], strict=True):
        engine.pages_of("a", start, end)
        step = engine.step([("a", start, end - start)], [[part[start:end] for part in each] for each in vectors])
        if start:
            got = kept_positions(engine.layers.cells.positions, step.tables[:, 0], step.lens[:, 0] - (end - start))
            expected = kept_positions(cache.positions, cache.block_tables[:, 0], cache.seq_lens[:, 0])
            assert got == expected, start
            assert sum(len(each) for layer in got for each in layer) == rule.held(start, start) * engine.size * lists
        budget = Compression(
            blocks=rule.held(end, end) * lists, policy=options.make_policy(), protect_first=4, protect_last=8
        )
        read_prompt(model, cache, tokens[:, :end], 0, budget, held=start)
    assert engine.layers.cells.compactions == len(ends)
    assert engine.layers.check.worst < 2e-5
