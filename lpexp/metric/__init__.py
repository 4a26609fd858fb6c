"""The metric dictionary: every key that a run logs, with formula, unit, aggregation and whether it is volatile.

Signs: lp_R the sampled token's log-prob from the rollout engine; lp_T the trainer's under the weights that sampled;
lp_P under the newest weights before the first optimiser step on the batch; lp_C of the gradient forward.
d = lp_T - lp_R (numerics), v = lp_P - lp_T (staleness), u = lp_C - lp_P (update), so lp_C - lp_R = u + v + d.
w' is the correction weight; A the advantage; s a sequence. <x> is the mean over the valid tokens of the whole global
batch, <x>_s over its sequences; valid: a response token. kept: valid with w' > 0, used by update/* and train/*.
Aggregations: T token mean, S sequence mean, X extreme, Q quantile, N count, F fraction, - other.
A volatile key (times, speeds, memory) may differ between two equal runs; `lpexp compare --exact` skips it.

An empty mask makes a key absent, never 0; nothing is clamped unless the formula says so; a non-finite log-prob fails
the step. Left out until what they measure exists: throughput/mfu_*,
staleness/dropped_samples, and the correction keys of veto, opsm and batch normalisation.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class Metric(NamedTuple):
    """One key, or a pattern of keys: <name> stands for one part between slashes."""

    key: str
    formula: str
    unit: str
    aggregation: str
    text: str
    volatile: bool = False


def _bins(where: str, bins: str) -> tuple[Metric, ...]:
    at = f"mismatch/by_{where}/<bin>"
    return (
        Metric(f"{at}/kl_k3", "<exp(d) - 1 - d> in the bin", "nat", "T", f"Gap within one bin; {bins}."),
        Metric(f"{at}/logprob_abs_diff_mean", "<|d|> in the bin", "nat", "T", f"Gap within one bin; {bins}."),
        Metric(f"{at}/token_frac", "tokens in the bin / valid tokens", "1", "F", f"Size of the bin; {bins}."),
        Metric(f"{at}/kl_share", "sum of k3 in the bin / sum of k3", "1", "F", f"The bin's part of the gap; {bins}."),
    )


METRICS: tuple[Metric, ...] = (
    # -- mismatch: same weights, two engines --------------------------------------------------------------------------
    Metric("mismatch/logprob_abs_diff_mean", "<|d|>", "nat", "T", "Typical gap; 0 when both sides compute alike."),
    Metric("mismatch/logprob_abs_diff_p50", "median of |d|", "nat", "Q", "Half the tokens are closer than this."),
    Metric("mismatch/logprob_abs_diff_p95", "95 % quantile of |d|", "nat", "Q", "Where the tail begins."),
    Metric("mismatch/logprob_abs_diff_p99", "99 % quantile of |d|", "nat", "Q", "The tail."),
    Metric("mismatch/logprob_abs_diff_max", "max |d|", "nat", "X", "The worst token; exactly 0 in a zero baseline."),
    Metric("mismatch/quantiles_exact", "1 up to 2^20 tokens, else 0", "1", "-", "0: quantiles are from a histogram."),
    Metric("mismatch/kl_k1", "<-d>", "nat", "T", "Unbiased KL(rollout || trainer) estimate; may be negative."),
    Metric("mismatch/kl_k2", "<d^2 / 2>", "nat", "T", "Biased, never negative."),
    Metric("mismatch/kl_k3", "<exp(d) - 1 - d>", "nat", "T", "Unbiased, never negative: the KL to look at."),
    Metric("mismatch/kl_k3_reverse", "<exp(-d) - 1 + d>", "nat", "T", "Explodes on rare-token outliers: a tail alarm."),
    Metric("mismatch/mult_prob_error", "<exp(|d|)>", "1", "T", "Factor by which probabilities differ; 1 is perfect."),
    Metric("mismatch/mult_prob_error_seq_max", "max_s mean_t exp(|d|)", "1", "X", "The worst sequence."),
    Metric("mismatch/ratio_extreme_frac", "share of exp(d) > 2 or < 1/2", "1", "F", "Tokens off by a factor of two."),
    Metric("mismatch/ratio_mean", "<exp(d)>", "1", "T", "About 1: a check for bias."),
    Metric("mismatch/prob_abs_diff_mean", "<|exp(lp_T) - exp(lp_R)|>", "1", "T", "The gap in probability."),
    Metric("mismatch/prob_abs_diff_max", "max |exp(lp_T) - exp(lp_R)|", "1", "X", "The worst gap in probability."),
    Metric("mismatch/prob_pearson", "corr(exp(lp_T), exp(lp_R))", "1", "T", "Absent if a variance is below 1e-12."),
    Metric("mismatch/chi2_token", "<exp(2 d)> - 1", "1", "T", "Variance of the token importance ratio."),
    Metric("mismatch/chi2_seq", "<exp(2 clamp(sum_t d, -20, 20))>_s - 1", "1", "S", "The same for whole sequences."),
    Metric("mismatch/chi2_seq_clamped_frac", "share of |sum_t d| > 20", "1", "F", "Sequences clamped in chi2_seq."),
    Metric("mismatch/log_ppl_abs_diff", "<|mean_t d|>_s", "nat", "S", "Gap of the sequences' log-perplexities."),
    Metric("mismatch/ppl_ratio", "<exp(-mean_t d)>_s", "1", "S", "Trainer perplexity over rollout perplexity."),
    Metric("mismatch/trainer_log_ppl", "<-mean_t lp_T>_s", "nat", "S", "Log-perplexity under the trainer."),
    Metric("mismatch/rollout_log_ppl", "<-mean_t lp_R>_s", "nat", "S", "Log-perplexity under the rollout."),
    Metric(
        "mismatch/js_divergence",
        "<g(lp_T - n) / 2 + g(lp_R - n) / 2>, g(x) = exp(x) - 1 - x, n = ln((exp(lp_T) + exp(lp_R)) / 2)",
        "nat",
        "T",
        "A surrogate under the rollout policy: equal to the Jensen-Shannon divergence for small gaps only.",
    ),
    Metric("mismatch/kl_per_entropy", "kl_k3 / train/entropy", "1", "-", "The gap relative to the policy's spread."),
    Metric("mismatch/seq_logratio_abs_mean", "<|sum_t d|>_s", "nat", "S", "Grows with length: plot it against that."),
    Metric("mismatch/nonfinite_count", "mask 1, lp_T or lp_R not finite", "tokens", "N", "Above 0 the run stops."),
    Metric("mismatch/valid_tokens", "sum of valid", "tokens", "N", "0 stops the run: no data is no agreement."),
    *_bins("prob", "bins on exp(lp_R)"),
    *_bins("position", "bins on the index in the response, half open"),
    *_bins("entropy", "quartiles q1 (lowest) to q4 of the full-vocabulary entropy"),
    Metric(
        "mismatch/worst_tokens", "20 largest |d| > 0", "-", "X", "A table: which tokens, and what was done to them."
    ),
    # -- staleness: newer against older weights -----------------------------------------------------------------------
    Metric("staleness/version_gap_mean", "<version at learning - version sampled>", "steps", "T", "Lag, mean."),
    Metric("staleness/version_gap_max", "max(version at learning - version sampled)", "steps", "X", "Lag, worst."),
    Metric("staleness/hist_<k>", "share of tokens with version gap k", "1", "F", "Lag, distribution."),
    Metric("staleness/mixed_version_frac", "<tokens of more than one version>_s", "1", "F", "Mixed sequences."),
    Metric("staleness/kl_k3", "<exp(v) - 1 - v>", "nat", "T", "What the lag costs; exactly 0 without one."),
    Metric("staleness/logprob_abs_diff_mean", "<|v|>", "nat", "T", "The same gap, typical size."),
    Metric("offpolicy/kl_k3", "<exp(x) - 1 - x>, x = lp_C - lp_R", "nat", "T", "All three gaps at once."),
    Metric("offpolicy/ratio_mean", "<exp(lp_C - lp_R)>", "1", "T", "All three gaps at once."),
    # -- routing: mixtures of experts --------------------------------------------------------------------------------
    Metric(
        "routing/disagreement_frac",
        "pairs (response token, layer) whose experts differ / pairs",
        "1",
        "F",
        "The trainer's own choice against the rollout's, as sets; with replay, what it would have chosen.",
    ),
    Metric("routing/token_any_frac", "share of tokens with a layer that differs", "1", "F", "Tokens touched."),
    Metric("routing/layers_per_token", "<layers that differ>", "layers", "T", "How deep a token is touched."),
    Metric(
        "routing/margin_p05",
        "5 % quantile over tokens of min_layer (k-th - (k+1)-th router score)",
        "1",
        "Q",
        "A small margin flips by rounding alone.",
    ),
    Metric("routing/replayed_frac", "pairs routed as the rollout did / pairs", "1", "F", "1 with replay, 0 without."),
    Metric("routing/replay_missing_count", "pairs not replayed", "pairs", "N", "With replay on; 0 is right."),
    # -- correction: what was done about it ---------------------------------------------------------------------------
    Metric("correction/weight_mean", "<w'>", "1", "T", "Mean weight; 1 without a correction."),
    Metric("correction/weight_min", "min w'", "1", "X", "Smallest weight."),
    Metric("correction/weight_max", "max w'", "1", "X", "Largest weight."),
    Metric("correction/weight_std", "sqrt(<w'^2> - <w'>^2)", "1", "T", "Spread of the weights."),
    Metric("correction/ess", "<w'>^2 / <w'^2>", "1", "T", "Effective sample size, a share; zeros count."),
    Metric("correction/clip_frac", "share truncated", "1", "F", "Tokens whose weight a bound changed."),
    Metric("correction/clip_frac_low", "share truncated from below", "1", "F", "Raised to the lower bound."),
    Metric("correction/clip_frac_high", "share truncated from above", "1", "F", "Cut to the upper bound."),
    Metric("correction/masked_token_frac", "share of w' = 0", "1", "F", "Tokens removed."),
    Metric("correction/masked_seq_frac", "share of sequences with no w' > 0", "1", "F", "Sequences removed entirely."),
    Metric("correction/masked_correct_frac", "removed sequences with reward >= 1", "1", "F", "Good ones among them."),
    Metric("correction/logratio_clamped_frac", "share of |lp_P - lp_R| > 20", "1", "F", "Clamped before exp."),
    Metric("correction/kl_k3_kept", "k3 of d over kept tokens", "nat", "T", "The gap that the loss still sees."),
    Metric("correction/kl_k3_removed", "k3 of d over removed tokens", "nat", "T", "The gap that was taken out."),
    # -- update and train ---------------------------------------------------------------------------------------------
    Metric("update/kl_k3", "<exp(u) - 1 - u>", "nat", "T", "How far the batch's own updates moved the policy."),
    Metric("update/ratio_mean", "<exp(u)>", "1", "T", "PPO ratio, mean."),
    Metric("update/ratio_max", "max exp(u)", "1", "X", "PPO ratio, largest."),
    Metric("update/clip_frac_high_pos", "of A > 0: exp(u) > 1 + eps_high", "1", "F", "Binding: gradient zero."),
    Metric("update/clip_frac_low_neg", "of A < 0: exp(u) < 1 - eps_low", "1", "F", "Binding: gradient zero."),
    Metric("update/clip_frac_low_pos", "of A > 0: exp(u) < 1 - eps_low", "1", "F", "Not binding: drift only."),
    Metric("update/clip_frac_high_neg", "of A < 0: exp(u) > 1 + eps_high", "1", "F", "Not binding: drift only."),
    Metric("update/clip_frac", "binding tokens / kept tokens", "1", "F", "Share of tokens without a gradient."),
    Metric("train/loss", "the optimised total", "1", "-", "Loss of the step; mean of its optimiser steps."),
    Metric("train/pg_loss", "policy part of the loss", "1", "-", "Loss without the penalty."),
    Metric("train/kl_penalty", "KL-to-reference part, after its coefficient", "1", "-", "The penalty in the loss."),
    Metric("train/kl_ref_k3", "<exp(x) - 1 - x>, x = lp_ref - lp_C", "nat", "T", "Distance to the reference."),
    Metric("train/entropy", "<-sum_v p_v ln p_v>", "nat", "T", "Full vocabulary, at the sampling temperature."),
    Metric("train/entropy_sampled", "<-lp_C>", "nat", "T", "The cheap stand-in, beside it."),
    Metric("train/grad_norm", "global L2 before clipping", "1", "X", "Size of the gradient."),
    Metric("train/grad_clip_frac", "1 if grad_norm exceeded the limit", "1", "F", "Share of clipped updates."),
    Metric("train/lr", "value of the schedule", "1", "-", "Learning rate."),
    Metric("train/param_norm", "L2 of all parameters", "1", "-", "Size of the weights."),
    Metric(
        "train/skipped_steps", "updates dropped for a non-finite gradient", "updates", "N", "0: such a step raises."
    ),
    # -- reward, response, evaluation ---------------------------------------------------------------------------------
    Metric("reward/mean", "mean reward", "1", "-", "Over all finished samples of the step, before any filter."),
    Metric("reward/std", "population standard deviation", "1", "-", "Over all finished samples of the step."),
    Metric("reward/min", "smallest reward", "1", "X", "Over all finished samples of the step."),
    Metric("reward/max", "largest reward", "1", "X", "Over all finished samples of the step."),
    Metric("reward/group_std_mean", "mean population std within a group", "1", "-", "What the advantage lives on."),
    Metric("reward/zero_std_group_frac", "share of groups with std < 1e-8", "1", "F", "Groups that teach nothing."),
    Metric("reward/all_correct_group_frac", "share of groups, every sample correct", "1", "F", "Too easy."),
    Metric("reward/all_wrong_group_frac", "share of groups, every reward <= 0", "1", "F", "Too hard."),
    Metric("reward/errors", "rewards that raised or timed out", "samples", "N", "Counted, never 0 in silence."),
    Metric("reward/<component>", "mean of a named part", "1", "-", "A part of the reward; `correct` is accuracy."),
    Metric("eval/<set>/greedy_acc", "share correct at temperature 0", "1", "F", "Held-out prompts, one answer each."),
    Metric("eval/<set>/sampled_acc", "share correct when sampled", "1", "F", "Held-out prompts, n answers each."),
    Metric("eval/<set>/pass_at_k", "mean 1 - C(n-c, k) / C(n, k), k = n", "1", "-", "Right at least once in k tries."),
    Metric("eval/<set>/mean_reward", "mean reward of sampled answers", "1", "-", "Held-out reward."),
    Metric("response/length_mean", "mean length", "tokens", "-", "Generated tokens, stop token included."),
    Metric("response/length_p50", "median length", "tokens", "Q", "Generated tokens, stop token included."),
    Metric("response/length_p95", "95 % quantile of length", "tokens", "Q", "Generated tokens, stop token included."),
    Metric("response/length_max", "largest length", "tokens", "X", "Generated tokens, stop token included."),
    Metric("response/truncated_frac", "share with finish = length", "1", "F", "Answers cut at the limit."),
    Metric("response/aborted_frac", "share with finish = abort", "1", "F", "Answers that never ended."),
    Metric("response/empty_frac", "share with zero tokens", "1", "F", "Nothing was generated."),
    Metric("response/repetition_frac", "share with > 30 % repeated 4-grams", "1", "F", "Answers that go in circles."),
    # -- sync and quantisation ----------------------------------------------------------------------------------------
    Metric("sync/version", "version served after the sync", "steps", "N", "Grows by one a sync."),
    Metric("sync/seconds", "quantize + transfer + load + rest", "s", "-", "Wall time of the weight update.", True),
    Metric("sync/quantize_seconds", "time spent quantising", "s", "-", "Part of sync/seconds.", True),
    Metric("sync/transfer_seconds", "time on the wire", "s", "-", "Part of sync/seconds.", True),
    Metric("sync/load_seconds", "time to load into the engines", "s", "-", "Part of sync/seconds.", True),
    Metric("sync/bytes", "bytes of one copy of the weights", "bytes", "N", "On the wire, scales included."),
    Metric("sync/quantized_param_frac", "parameters sent quantised / all", "1", "F", "How much the format covers."),
    Metric("sync/checksum_ok", "1 iff sent and held digests agree", "1", "-", "Recomputed on each engine; 0 stops."),
    Metric(
        "sync/contract_ok", "1 iff both sides' contracts hash alike", "1", "-", "Compared at the start; unequal stops."
    ),
    Metric("quant/<class>/rel_error", "|W - dq(W)| / |W|", "1", "-", "Over all tensors of a module class."),
    Metric("quant/<class>/sqnr_db", "-20 log10(rel_error)", "dB", "-", "The same as signal to noise."),
    Metric("quant/<class>/code_flip_frac", "codes that differ, trainer to server", "1", "F", "Must be 0."),
    Metric("quant/<class>/code_change_frac", "codes that differ from the last sync", "1", "F", "How fast codes move."),
    Metric("quant/<class>/saturated_frac", "codes at the format's maximum", "1", "F", "Values at the edge."),
    Metric("quant/<class>/zero_block_frac", "blocks with amax 0", "1", "F", "Dead blocks."),
    Metric("quant/<class>/scale_min", "smallest scale", "1", "X", "Extremes of the scales."),
    Metric("quant/<class>/scale_max", "largest scale", "1", "X", "Extremes of the scales."),
    # -- time, speed, memory ------------------------------------------------------------------------------------------
    Metric("time/step", "wall time since the line before", "s", "-", "The parts and `unaccounted` sum to it.", True),
    Metric("time/rollout", "waiting for samples", "s", "-", "Generation that nothing else hides.", True),
    Metric("time/reward", "scoring", "s", "-", "Reward functions.", True),
    Metric("time/recompute", "the lp_T forward", "s", "-", "0 where the training forward serves.", True),
    Metric("time/learn", "forward, backward, optimiser", "s", "-", "Without recompute.", True),
    Metric("time/optimizer", "the optimiser's part of time/learn", "s", "-", "Inside learn, in no sum.", True),
    Metric("time/sync", "weight update", "s", "-", "As the driver sees it.", True),
    Metric("time/eval", "held-out evaluation", "s", "-", "As the driver sees it.", True),
    Metric("time/checkpoint", "saving", "s", "-", "Counts for the step after, if saved between two.", True),
    Metric("time/wait", "waiting for something else", "s", "-", "As the driver sees it.", True),
    Metric("time/unaccounted", "time/step - its parts", "s", "-", "What no part claims.", True),
    Metric(
        "throughput/rollout_tokens_per_s",
        "generated tokens / seconds generated",
        "tokens/s",
        "-",
        "No padding.",
        True,
    ),
    Metric("throughput/train_tokens_per_s", "valid tokens / time/learn", "tokens/s", "-", "No padding.", True),
    Metric("throughput/samples_per_s", "samples / time/step", "samples/s", "-", "Whole loop.", True),
    Metric(
        "throughput/longest_sample_tokens_per_s",
        "longest response / seconds generated",
        "tokens/s",
        "-",
        "How fast the straggler went.",
        True,
    ),
    Metric(
        "memory/host_rss_bytes", "resident set of the run's processes", "bytes", "-", "Pages shared count twice.", True
    ),
    Metric("memory/<role>/<phase>/allocated_peak_bytes", "peak allocated", "bytes", "X", "Accelerator memory.", True),
    Metric("memory/<role>/<phase>/reserved_peak_bytes", "peak reserved", "bytes", "X", "Accelerator memory.", True),
)


@functools.lru_cache(maxsize=4096)
def find(key: str) -> Metric | None:
    """The entry that a logged key belongs to; a key written out goes before a pattern."""
    return next((m for m in METRICS if m.key == key), None) or next(
        (m for m in METRICS if "<" in m.key and _pattern(m.key).fullmatch(key)), None
    )


def is_volatile(key: str) -> bool:
    """May this key differ between two equal runs? Unknown keys may not."""
    metric = find(key)
    return metric is not None and metric.volatile


@functools.cache
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(
        "".join("[^/]+" if part.startswith("<") else re.escape(part) for part in re.split("(<[^>]+>)", key))
    )
