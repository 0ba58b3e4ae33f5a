import math
import random
from itertools import pairwise

import pytest

from torchtitan_mixtures.models.mone.capacity import (
    Budget,
    allocate,
    check_distribution,
    compute_capacity_distribution,
    count_tokens,
    expert_shares,
    expert_widths,
    fixed_capacity,
)

# Of delta 2 and beta 10: experts, e_c, capacities by the multiplicative and the divisive form.
GOLDEN = [
    (2, 0.6, "0.800000 0.200000", "0.800000 0.200000"),
    (2, 0.75, "0.500000 0.500000", "0.500000 0.500000"),
    (3, 0.3, "0.816257 0.175614 0.008129", "0.817109 0.174337 0.008554"),
    (3, 0.4, "0.587537 0.318695 0.093768", "0.590810 0.313785 0.095405"),
    (3, 0.5, "0.435977 0.346035 0.217988", "0.439734 0.340400 0.219867"),
    (3, 0.6, "0.314543 0.328186 0.357271", "0.318025 0.322963 0.359012"),
    (3, 0.8, "0.123000 0.215500 0.661500", "0.124978 0.212533 0.662489"),
    (4, 0.15, "0.816336 0.175531 0.008116 0.000017", "0.817203 0.174238 0.008538 0.000021"),
    (4, 0.2, "0.600938 0.310375 0.082795 0.005892", "0.605389 0.304838 0.083312 0.006461"),
    (4, 0.25, "0.488467 0.329849 0.150409 0.031275", "0.494789 0.323435 0.148968 0.032809"),
    (4, 0.3, "0.413539 0.321422 0.194175 0.070865", "0.420435 0.315346 0.191221 0.072999"),
    (4, 0.4, "0.306958 0.282450 0.239149 0.171443", "0.313594 0.277683 0.234685 0.174037"),
    (4, 0.46875, "0.25 0.25 0.25 0.25", "0.256047 0.246147 0.245198 0.252608"),
    (4, 0.5, "0.226838 0.234643 0.251069 0.287450", "0.232566 0.231183 0.246235 0.290016"),
    (4, 0.6, "0.161207 0.184402 0.241285 0.413106", "0.165798 0.182086 0.236724 0.415392"),
    (4, 0.7, "0.105885 0.133856 0.213918 0.546342", "0.109250 0.132498 0.210065 0.548187"),
    (4, 0.8, "0.059416 0.084283 0.169597 0.686704", "0.061536 0.083680 0.166793 0.687991"),
    (4, 0.9, "0.022222 0.037307 0.105151 0.835320", "0.023142 0.037209 0.103689 0.835961"),
]
# Experts, e_c, delta, beta, form, capacities.
OTHER_PARAMETERS = [
    (4, 0.4, 3, 10, "multiplicative", "0.344738 0.267159 0.195969 0.192133"),
    (4, 0.4, 3, 10, "divisive", "0.316048 0.275431 0.233769 0.174752"),
    (4, 0.4, 4, 10, "multiplicative", "0.438401 0.220642 0.101835 0.239122"),
    (4, 0.4, 2, 1, "divisive", "0.373391 0.234253 0.195187 0.197170"),
    (4, 0.4, 2, 0.1, "divisive", "0.667240 0.014048 0.011258 0.307454"),
    (4, 0.6, 3, 10, "multiplicative", "0.190013 0.180039 0.197419 0.432529"),
    (3, 0.5, 4, 1, "multiplicative", "0.622117 0.066825 0.311058"),
]
FORMS = ("multiplicative", "divisive")


def numbers(text):
    return [float(word) for word in text.split()]


def cost(capacities):
    experts = len(capacities)
    return sum(c / 2 ** (experts - 1 - j) for j, c in enumerate(capacities))


def earned(experts, delta, form):
    return [delta**j if form == "multiplicative" else delta**-j for j in range(experts)]


def objective(capacities, delta, beta, form):
    gain = sum(c * a for c, a in zip(capacities, earned(len(capacities), delta, form), strict=True))
    return gain - beta * sum(c * math.log(c) for c in capacities if c > 0)


@pytest.mark.parametrize(("experts", "e_c", "multiplicative", "divisive"), GOLDEN)
def test_capacities_are_those_of_the_table(experts, e_c, multiplicative, divisive):
    for form, expected in zip(FORMS, (multiplicative, divisive), strict=True):
        found = compute_capacity_distribution(e_c, experts, incentive=form)
        assert found == pytest.approx(numbers(expected), abs=1e-6)


@pytest.mark.parametrize(("experts", "e_c", "delta", "beta", "form", "expected"), OTHER_PARAMETERS)
def test_capacities_with_other_parameters(experts, e_c, delta, beta, form, expected):
    found = compute_capacity_distribution(e_c, experts, delta, beta, form)
    assert found == pytest.approx(numbers(expected), abs=1e-6)


def test_the_multiplicative_form_with_delta_2_does_not_depend_on_beta():
    expected = compute_capacity_distribution(0.4, 4)
    for beta in (0.1, 1, 100, 1000):
        assert compute_capacity_distribution(0.4, 4, beta=beta) == pytest.approx(expected, abs=1e-9)


def test_three_experts_have_the_best_of_all_feasible_capacities():
    # c_3 alone is free: sum c = 1 and c_1 / 4 + c_2 / 2 + c_3 = e_c give the others.
    for e_c in (0.26, 0.4, 0.7, 0.97):
        for delta, beta in ((2, 10), (4, 1), (1.5, 0.3)):
            for form in FORMS:
                found = compute_capacity_distribution(e_c, 3, delta, beta, form)
                best = objective(found, delta, beta, form)
                feasible = 0
                for step in range(2001):
                    c_3 = step / 2000
                    c_2 = 4 * e_c - 1 - 3 * c_3
                    c_1 = 1 - c_2 - c_3
                    if min(c_1, c_2) >= 0:
                        feasible += 1
                        assert objective((c_1, c_2, c_3), delta, beta, form) <= best + 1e-12
                assert feasible > 10


def test_capacities_meet_the_conditions_of_an_optimum():
    # Of the Lagrangian: a_j - beta (ln c_j + 1) = nu + lambda d_j for two numbers nu and lambda.
    draw = random.Random(0)
    for _ in range(300):
        experts = draw.randint(3, 6)
        least = 2.0 ** -(experts - 1)
        e_c = draw.uniform(least * 1.2, 0.95)
        delta, beta = draw.uniform(1.1, 4), 10 ** draw.uniform(-0.3, 2)
        form = draw.choice(FORMS)
        found = compute_capacity_distribution(e_c, experts, delta, beta, form)
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert cost(found) == pytest.approx(e_c, abs=1e-10)
        if min(found) < 1e-200:
            continue
        values = [
            (a - beta * math.log(c)) / beta
            for a, c in zip(earned(experts, delta, form), found, strict=True)
        ]
        shares = [2.0 ** -(experts - 1 - j) for j in range(experts)]
        slopes = [
            (v - u) / (t - s)
            for (u, v), (s, t) in zip(pairwise(values), pairwise(shares), strict=1)
        ]
        scale = 1 + max(abs(slope) for slope in slopes)
        assert max(slopes) - min(slopes) < 1e-8 * scale / least


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7])
def test_at_its_limits_one_expert_has_all_tokens(experts, form):
    largest = (*[0.0] * (experts - 1), 1.0)
    assert compute_capacity_distribution(1, experts, incentive=form) == largest
    assert compute_capacity_distribution(1.0, experts, incentive=form) == largest
    least = 2.0 ** -(experts - 1)
    assert compute_capacity_distribution(least, experts, incentive=form) == largest[::-1]


@pytest.mark.parametrize("form", FORMS)
def test_close_to_its_limits_capacities_are_still_right(form):
    for e_c in (math.nextafter(0.125, 1), 0.125 + 1e-9, 1 - 1e-9, math.nextafter(1, 0)):
        found = compute_capacity_distribution(e_c, 4, incentive=form)
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert cost(found) == pytest.approx(e_c, abs=1e-12)
        assert min(found) >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1249, 4), "e_c = 0.1249.*0.125 to 1"),
        ((1.01, 4), "e_c = 1.01"),
        ((0.0, 4), "e_c = 0"),
        ((-0.5, 4), "e_c = -0.5"),
        ((math.nan, 4), "e_c = nan"),
        ((0.5, 1), "e_c = 0.5"),
        ((0.5, 0), "E = 0"),
        ((0.5, 4, 1.0), "delta = 1"),
        ((0.5, 4, 0.5), "delta = 0.5"),
        ((0.5, 4, math.nan), "delta = nan"),
        ((0.5, 4, math.inf), "delta = inf"),
        ((0.5, 4, 2, 0), "beta = 0"),
        ((0.5, 4, 2, -1), "beta = -1"),
        ((0.5, 4, 2, math.inf), "beta = inf"),
        ((0.5, 4, 2, math.nan), "beta = nan"),
        ((0.5, 4, 2, 10, "additive"), "incentive = 'additive'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compute_capacity_distribution(*arguments)


def test_shares_and_widths_halve_from_the_largest_expert_down():
    assert expert_shares(4) == [0.125, 0.25, 0.5, 1]
    assert expert_widths(768, 4) == [96, 192, 384, 768]
    assert expert_widths(12, 1) == [12]


@pytest.mark.parametrize(
    ("rule", "capacity", "expected"),
    [
        ("proportionate", 4 / 15, [8 / 15, 4 / 15, 2 / 15, 1 / 15]),
        ("proportionate", 0.266667, [8 / 15, 4 / 15, 2 / 15, 1 / 15]),
        ("uniform", 0.46875, [0.25] * 4),
        ("greedy", 0.3, [0.8, 0, 0, 0.2]),
        ("greedy", 0.4, [1 - 0.314286, 0, 0, 0.314286]),
        ("greedy", 1, [0, 0, 0, 1]),
        ("greedy", 0.125, [1, 0, 0, 0]),
        ("skip", 0.4, [0, 0, 0, 0.4]),
        ("skip", 0.05, [0, 0, 0, 0.05]),
        ("skip", 1, [0, 0, 0, 1]),
        ("entropy", 0.3, [0.413539, 0.321422, 0.194175, 0.070865]),
    ],
)
def test_allocations_are_those_of_table_2(rule, capacity, expected):
    found = allocate(rule, capacity, 4)
    assert found == pytest.approx(expected, abs=1e-6)
    assert cost(found) == pytest.approx(capacity, abs=1e-6)
    assert sum(found) == pytest.approx(capacity if rule == "skip" else 1)


def test_entropy_passes_its_parameters_on():
    expected = compute_capacity_distribution(0.4, 4, 3, 1, "divisive")
    assert allocate("entropy", 0.4, 4, 3, 1, "divisive") == expected


@pytest.mark.parametrize("rule", ["entropy", "proportionate", "uniform", "greedy", "skip"])
@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_allocations_of_any_number_of_experts_cost_their_capacity(rule, experts):
    capacity = fixed_capacity(rule, experts)
    if capacity is None:
        capacity = 0.7 if experts > 1 or rule == "skip" else 1.0
    found = allocate(rule, capacity, experts)
    assert len(found) == experts and min(found) >= 0
    assert cost(found) == pytest.approx(capacity, abs=1e-9)


@pytest.mark.parametrize(
    ("rule", "capacity", "message"),
    [
        ("proportionate", 0.3, "capacity = 0.3.*'proportionate'.*0.266667"),
        ("uniform", 0.5, "capacity = 0.5.*'uniform'.*0.46875"),
        ("greedy", 0.1, "capacity = 0.1.*'greedy'"),
        ("greedy", 1.1, "capacity = 1.1.*'greedy'"),
        ("skip", 0, "capacity = 0.*'skip'"),
        ("skip", 1.5, "capacity = 1.5.*'skip'"),
        ("entropy", 0.1, "e_c = 0.1"),
        ("greedy", math.nan, "capacity = nan"),
    ],
)
def test_allocations_that_cannot_have_a_capacity_say_so(rule, capacity, message):
    with pytest.raises(ValueError, match=message):
        allocate(rule, capacity, 4)


@pytest.mark.parametrize(
    ("num_tokens", "e_c", "tokens", "realised"),
    [
        (196, 0.3, (83, 62, 38, 13), 0.295281),
        (196, 0.4, (62, 55, 46, 33), 0.395408),
        (196, 0.5, (46, 45, 49, 56), 0.497449),
        (196, 0.6, (33, 36, 47, 80), 0.595026),
        (64, 0.5, (15, 15, 16, 18), 0.494141),
        (256, 0.5, (59, 60, 64, 73), 0.497559),
    ],
)
def test_budgets_are_those_of_the_specification(num_tokens, e_c, tokens, realised):
    budget = count_tokens(compute_capacity_distribution(e_c, 4), num_tokens)
    assert budget == Budget(tokens)
    assert budget.effective_capacity == pytest.approx(realised, abs=1e-6)
    assert budget.num_tokens == num_tokens


def test_budgets_never_cost_more_than_their_capacity_and_little_less():
    for num_tokens in (4, 7, 49, 196, 256, 1000):
        for e_c in (0.125, 0.15, 0.25, 0.46875, 0.55, 0.95, 1.0):
            budget = count_tokens(compute_capacity_distribution(e_c, 4), num_tokens)
            assert sum(budget.tokens) == num_tokens and budget.skipped == 0
            # Each of three experts may lose up to a token, of its width less the smallest's.
            lost = (0.125 + 0.375 + 0.875) / num_tokens
            assert e_c - lost - 1e-9 <= budget.effective_capacity <= e_c + 1e-5


def test_a_capacity_that_is_a_whole_number_of_tokens_is_not_rounded_down():
    assert count_tokens(compute_capacity_distribution(0.46875, 4), 196).tokens == (49,) * 4
    assert count_tokens((0.1, 0.2, 0.7), 10).tokens == (1, 2, 7)
    assert count_tokens((0.71, 0.29), 100).tokens == (71, 29)  # 0.29 * 100 is a little below 29
    assert count_tokens(compute_capacity_distribution(0.75, 2), 64).tokens == (32, 32)


def test_budgets_are_rounded_down_to_a_multiple():
    distribution = compute_capacity_distribution(0.5, 4)
    assert count_tokens(distribution, 196, 8).tokens == (52, 40, 48, 56)
    assert count_tokens(distribution, 196, 1000).tokens == (196, 0, 0, 0)
    budget = count_tokens(allocate("skip", 0.4, 4), 196, 8, skips=True)
    assert budget == Budget((0, 0, 0, 72), 124)


def test_tokens_that_no_expert_takes_skip_the_block():
    budget = count_tokens(allocate("skip", 0.4, 4), 196, skips=True)
    assert budget == Budget((0, 0, 0, 78), 118)
    assert budget.effective_capacity == pytest.approx(78 / 196)
    assert budget.rows == (78,) * 4
    assert count_tokens(allocate("skip", 0.5, 1), 8, skips=True) == Budget((4,), 4)
    assert count_tokens(allocate("skip", 0.5, 1), 9, 2, skips=True) == Budget((4,), 5)


def test_fewer_tokens_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"3 tokens.*4 experts"):
        count_tokens((0.25,) * 4, 3)


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ([0.5, 0.5], r"3 experts \(num_experts\)"),
        ([0.5, 0.6, -0.1], ">= 0"),
        ([0.5, 0.4, 0.2], "not 1.1"),
        ([math.nan, 0.5, 0.5], "sum to 1"),
        ([], "3 experts"),
    ],
)
def test_capacities_of_users_are_checked(capacities, message):
    with pytest.raises(ValueError, match=message):
        check_distribution(capacities, 3)


def test_capacities_of_a_solver_pass_although_their_sum_is_rounded():
    check_distribution(compute_capacity_distribution(0.6, 3), 3)
    check_distribution([0.314543, 0.328186, 0.357272], 3)


def test_rows_are_the_tokens_of_an_expert_or_a_larger_one():
    budget = Budget((3, 0, 2, 1), 4)
    assert budget.rows == (6, 3, 3, 1)
    assert budget.num_tokens == 10
    assert budget.effective_capacity == pytest.approx((3 / 8 + 2 / 2 + 1) / 10)
    assert budget.with_full_tokens(1) == Budget((3, 0, 2, 2), 4)
    assert hash(budget) == hash(Budget((3, 0, 2, 1), 4))


def test_ranks_share_every_expert_evenly_or_not_at_all():
    assert Budget((4, 2, 6), 2).share_of_rank(2) == Budget((2, 1, 3), 1)
    with pytest.raises(ValueError, match="tokens_multiple = 2"):
        Budget((4, 3, 6)).share_of_rank(2)
    with pytest.raises(ValueError):
        Budget((4, 2, 6), 3).share_of_rank(2)


def test_a_part_of_the_tokens_has_the_capacities_of_all():
    assert Budget((5, 3, 8)).part_of_rank(2) == Budget((3, 1, 4))
    assert Budget((0, 0, 7), 9).part_of_rank(2) == Budget((0, 0, 3), 5)
    assert Budget((5, 3, 8)).part_of_rank(1) == Budget((5, 3, 8))
    with pytest.raises(ValueError, match="16 tokens: 3 ranks"):
        Budget((5, 3, 8)).part_of_rank(3)


@pytest.mark.parametrize("shares", [(0.5, 0.9, 0.9), (-0.1, 0.5, 0.6), ()])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="must be 0 or more, and 1 together at most"):
        count_tokens(shares, 64)
