"""How much a round may draft at each load, from what a round costs on this device and what drafting gains.

At warm-up, rounds are timed per number of rows and candidate: none, chains, and the best static trees of several sizes
for this draft's profile. A candidate's gain is the expected number of decisions of a round, from how often its nodes
are right: at first what the profile says, then what is seen, per slot where rounds begin and step. The best ratio wins,
no speculation included, so that speculating is never slower than not, and ends by itself where drafts are no longer
accepted. What a draft costs before its first round, reading the prompt too, is asked about per request: a list must be
long enough to earn it. Knows decoders and numbers; nothing of queues.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul
from statistics import median

from model.decoding.list_decoder import ListDecoder
from model.decoding.profile import Profile
from model.decoding.request import ListRequest, RoundStats
from model.decoding.rows import Moment
from model.decoding.topology import Budget, FixedBudget, Tree, best_trees, gains

LOADS = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # nodes of the candidates
LONG_LIST = 20  # items of the lists that rounds are timed on
PRIOR = 30  # decisions that what the profile says is worth to begin with
DOUBT = 0.5  # and for ever: where little is seen, little is known
FADE = 0.99  # of what was seen, a round
DECIDE_EVERY = 32  # rounds
PROBE_EVERY = 64  # rounds, or requests, without speculation
# Every budget is timed on the same stretch of the same lists, in the middle of a list of ten: the further down, the
# more a round has to look at, and what it reads goes by turns with the slots. Rounds right after a prompt, or after
# those of another budget, find the caches cold, and are not timed.
FIRST_ROUNDS = 4
STRETCH = 12  # decisions
SETTLING = 2  # rounds
SATURATED = 0.9  # of what a row's share of a round costs at the load before
FEW_ROWS = 4
PROBE_ROUNDS = 8  # of a request drafted for to try


class LoadBudget:
    """Budget by rows in use: the cheapest per decision at the smallest measured load not below it. `observe` every
    round, and it follows what is accepted."""

    def __init__(
        self,
        seconds: Mapping[int, Mapping[Budget, float]],
        profile: Profile,
        prompt_seconds: float = 0.0,
        decisions_per_item: float = 1.0,
    ) -> None:
        """`seconds` a round takes, by load and candidate; `prompt_seconds`: what the draft adds to reading a prompt;
        `decisions_per_item`: of an item's codes those that are a choice, on average. A round that drafts does all that
        one without does: where it was measured as cheaper, the other was disturbed, and it counts as much."""
        if not seconds or not all(seconds.values()):
            raise ValueError("a budget needs at least one load, and a candidate for each")
        self.prompt_seconds, self.decisions_per_item = prompt_seconds, decisions_per_item
        self._refused, self._probing = 0, 0
        self.seconds = {
            load: {candidate: max(found, costs.get(Budget(0), 0.0)) for candidate, found in costs.items()}
            for load, costs in sorted(seconds.items())
        }
        self.profile = profile
        slots = range(len(profile.acceptance))
        # What the profile says is where it begins, and fades like everything seen.
        self._expected, self._passed = ([[float(PRIOR)] * profile.steps for _ in slots] for _ in range(2))
        self._begun = [PRIOR * share for share in profile.begins]
        self._rates = {
            budget: [_rates(budget, profile, slot) for slot in slots]
            for costs in self.seconds.values()
            for budget in costs
        }
        self._asked, self._last = 0, Budget(0)
        self._seen: list[tuple[list[list[float]], RoundStats]] = []
        self._decide()

    def __call__(self, rows: int) -> Budget:
        load = self._load(rows)
        self._asked += 1
        self._last = self.by_load[load]
        if not self._last.steps and (self._probing or not self._asked % PROBE_EVERY):
            self._probing = max(0, self._probing - 1)
            self._last = self._probe[load]
        return self._last

    def drafts(self, rows: int, items: int) -> bool:
        """Whether to draft for a request of `items`, one of `rows`: whether its rounds earn what its prompt costs more.
        Requests refused are tried now and then."""
        load = self._load(rows)
        # Rows share a round: what is saved of it is each one's own share.
        saved = items * self.decisions_per_item * self._saved[load] / load
        if saved > self.prompt_seconds:
            return True
        self._refused += 1
        if self._refused % PROBE_EVERY:
            return False
        self._probing = PROBE_ROUNDS
        return True

    def decisions(self, budget: Budget) -> float:
        """Expected decisions of a round, by what was seen of late and the profile."""
        begun = sum(self._begun)
        ways = zip(self._begun, self._rates[budget], self._corrections(), strict=True)
        return 1.0 + sum(share * sum(_survival(rates, right)) for share, rates, right in ways) / begun

    def observe(self, stats: RoundStats) -> None:
        """Learn from a round's counts; every so often decide anew. A round without drafts says nothing of them."""
        if not (self._last.steps and stats.draft_tokens):
            return
        self._seen.append((self._rates[self._last], stats))
        if len(self._seen) == DECIDE_EVERY:
            self._learn()
            self._decide()

    def _learn(self) -> None:
        """Count what was seen, all of it as old: round by round it would cost a tenth of a round."""
        fade = FADE ** len(self._seen)
        for counts in (self._begun, *self._expected, *self._passed):
            counts[:] = [fade * count for count in counts]
        for rates, stats in self._seen:
            for slot, (tried, passed) in enumerate(zip(stats.tried, stats.passed, strict=True)):
                if not any(tried):
                    continue
                self._begun[slot] += tried[0]
                for step, rate in enumerate(rates[slot][: len(tried)]):
                    self._expected[slot][step] += tried[step] * rate
                    self._passed[slot][step] += passed[step]
        self._seen.clear()

    def _load(self, rows: int) -> int:
        """The smallest measured load not below `rows`."""
        return next((load for load in self.seconds if load >= rows), max(self.seconds))

    def _corrections(self) -> list[list[float]]:
        """What was seen over what the profile expected, by slot and step."""
        both = zip(self._passed, self._expected, strict=True)
        return [[(p + DOUBT) / (e + DOUBT) for p, e in zip(passed, expected, strict=True)] for passed, expected in both]

    def _decide(self) -> None:
        decisions = {budget: self.decisions(budget) for budget in self._rates}

        def cheapest(costs: Mapping[Budget, float]) -> Budget:
            return min(costs, key=lambda c: costs[c] / decisions[c])

        self.by_load = {load: cheapest(costs) for load, costs in self.seconds.items()}
        # Where drafting does not pay it is tried now and then: it may pay again.
        drafting = {load: {c: s for c, s in costs.items() if c.steps} for load, costs in self.seconds.items()}
        self._probe = {load: cheapest(costs) if costs else Budget(0) for load, costs in drafting.items()}
        # Of the seconds a decision takes without speculation; what was not measured without it is always drafted.
        alone = {load: costs.get(Budget(0), math.inf) for load, costs in self.seconds.items()}
        prices = {load: self.seconds[load][best] / decisions[best] for load, best in self.by_load.items()}
        self._saved = {load: alone[load] - price for load, price in prices.items()}


def candidates(profile: Profile, max_steps: int, max_nodes: int) -> list[Budget]:
    """No speculation, and for each size the chain and the best trees, where the trees are none."""
    steps = min(profile.steps, max_steps)
    acceptance = [slot[:steps] for slot in profile.acceptance]
    found = [Budget(0)]
    for size in SIZES:
        if size <= steps:
            found.append(Budget(size))
        trees = Budget.static(best_trees(acceptance, size))
        if trees.width > 1 and trees.steps * trees.width <= max_nodes:
            found.append(trees)
    return found


def measured_budget(
    decoder: ListDecoder, requests: Sequence[ListRequest], profile: Profile, repeats: int = 6
) -> LoadBudget:
    """Time rounds of `requests` (repeated as needed) at every load up to the decoder's rows. The decoder must be idle;
    it is idle again afterwards, and its budget is the one returned."""
    num_rows = len(decoder.rows.held)
    loads = [load for load in LOADS if load < num_rows] + [num_rows]
    possible = candidates(profile, decoder.max_steps, decoder.max_nodes) if decoder.draft else [Budget(0)]
    costs: dict[int, dict[Budget, float]] = {}
    for before, load in zip([0, *loads], loads, strict=False):
        if _saturated(costs):
            # A round is arithmetic by now: of more rows it takes as much longer.
            costs[load] = {candidate: found * load / before for candidate, found in costs[before].items()}
            continue
        # Lists that do not end in between: their prompts, which cost more than the rounds, are read once.
        batch = [replace(requests[i % len(requests)], k=min(decoder.max_k, LONG_LIST)) for i in range(load)]
        rounds = _Rounds(decoder, batch)
        gained: dict[Budget, float] = {}
        seconds: dict[Budget, float] = {}
        for candidate in possible:
            expected = expected_decisions(candidate, profile)
            if expected <= max(gained.values(), default=0.0):
                continue  # more nodes that gain nothing: noise could make them look cheaper
            gained[candidate] = expected
            seconds[candidate] = rounds.seconds(candidate, expected)
            prices = [seconds[timed] / gained[timed] for timed in gained]
            if len(prices) > 3 and min(prices[-3:]) > prices[-4]:
                break  # thrice dearer: what is larger still would only take time to say so
        # Turn by turn, so that a slow moment falls on all candidates; the quickest turn was disturbed least. Rounds of
        # few rows are quick and noisy: they get more turns, those of many one.
        for _ in range(repeats // load):
            for candidate, expected in gained.items():
                seconds[candidate] = min(seconds[candidate], rounds.seconds(candidate, expected))
        costs[load] = seconds
        _free(decoder)
    # Of prompts read alone, as they come while others are served: together they cost a little less.
    prompt_seconds = _prompt_seconds(decoder, requests[0], repeats) if decoder.draft else 0.0
    budget = LoadBudget(costs, profile, prompt_seconds, decoder.trie.decisions_per_item)
    decoder.budget = budget
    return budget


def _saturated(costs: Mapping[int, Mapping[Budget, float]]) -> bool:
    """Whether a row of the largest load costs about what it costs at the one before. Not told from few rows: those are
    quick to measure, and noisy."""
    *_, before, last = [0, 0, *costs]
    if before < FEW_ROWS:
        return False
    shares = [costs[load][Budget(0)] / load for load in (before, last)]
    return shares[1] >= SATURATED * shares[0]


def expected_decisions(budget: Budget, profile: Profile) -> float:
    """Decisions a round gains on average: the target's own, and each draft node it may come past."""
    slots = enumerate(profile.begins)
    return 1.0 + sum(share * sum(_survival(_rates(budget, profile, slot))) for slot, share in slots)


def _rates(budget: Budget, profile: Profile, slot: int) -> list[float]:
    """How often a round that has come to each step of the budget's tree comes past it."""
    chain: Tree = (((0, 0),),) * budget.steps
    found = gains(chain if budget.trees is None else budget.trees[slot], profile.acceptance[slot])
    return [after / before if before else 0.0 for before, after in zip((1.0, *found), found, strict=False)]


def _survival(rates: Sequence[float], corrections: Iterable[float] = ()) -> list[float]:
    """How often a round comes past each step, with what is known of it since."""
    known = list(corrections) or [1.0] * len(rates)
    return list(accumulate((min(1.0, rate * right) for rate, right in zip(rates, known, strict=False)), mul))


class _Rounds:
    """Rounds of one batch: those of every budget begin where those of all others do, as far down the lists."""

    def __init__(self, decoder: ListDecoder, batch: list[ListRequest]) -> None:
        self.decoder, self.batch = decoder, batch
        self._moment: Moment | None = None

    def seconds(self, budget: Budget, gained: float) -> float:
        """Of a round of the whole batch that gains so many decisions, on average over the stretch; over less of it
        where lists end before."""
        for rounds in (SETTLING, round(STRETCH / gained)):
            self._stand()
            self.decoder.budget = FixedBudget(budget)
            done, started = 0, time.perf_counter()
            while not done or (done < rounds and self._whole):  # a round of fewer rows would count as cheap
                self.decoder.round()  # what the host does between two of them is saved with them
                done += 1
        return (time.perf_counter() - started) / done

    @property
    def _whole(self) -> bool:
        return len(self.decoder.rows.in_use) == len(self.batch)

    def _stand(self) -> None:
        """Where the first rounds of all lists are over, or, where lists are too short, at their begin."""
        decoder = self.decoder
        if self._moment is not None and self._whole:
            decoder.rows.back_to(self._moment)
            return
        decoder.budget = FixedBudget(Budget(1 if decoder.draft else 0))
        for rounds in (FIRST_ROUNDS, 0):
            _free(decoder)
            _admit(decoder, self.batch)
            for _ in range(rounds):
                decoder.round()
            if self._whole:
                break
        self._moment = decoder.rows.moment()


def _prompt_seconds(decoder: ListDecoder, request: ListRequest, repeats: int) -> float:
    """What the draft adds to reading a prompt, turn by turn with and without it."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * repeats):
        started = time.perf_counter()
        _admit(decoder, [replace(request, speculation=not turn % 2)])
        seconds[not turn % 2].append(time.perf_counter() - started)
        _free(decoder)
    return max(0.0, median(seconds[True]) - median(seconds[False]))


def _admit(decoder: ListDecoder, batch: list[ListRequest]) -> None:
    """Read all prompts of the batch at once."""
    allowed, decoder.prefill_tokens = decoder.prefill_tokens, None
    decoder.admit(batch)
    decoder.prefill_tokens = allowed


def _free(decoder: ListDecoder) -> None:
    for index in decoder.rows.in_use:
        decoder.rows.free(index)
