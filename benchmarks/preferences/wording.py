"""What the page says about its numbers, whatever they are."""

from __future__ import annotations

from benchmarks.preferences.reward import ENDS_WITH_NUMBER, FAR, HAS_NUMBER, IS_RIGHT

READING = f"""\
Refusals and task are measured as in [the study](results.md#how-to-read-the-tables): greedy replies to malicious prompts
that served neither for training nor for choices, and to their benign twins. If a method was not run, the table says so.
Below a mean is its 95% interval: for other seeds and other prompts, or, if one seed was run, for other prompts alone.

- *second judge*: a small classifier trained on replies labelled by hand.
- *log-odds*: the readiness to refuse, by the first token of the reply.
- *task*: replies to held-out problems whose last number is the right one.
- *reward*: {HAS_NUMBER} for a number, {ENDS_WITH_NUMBER} for a finished reply that ends with one, and up to {IS_RIGHT}
  for how near it is to the right one: all if it is right, nothing if it is wrong by {FAR} or more. GRPO is paid by it;
  *in training* it is the mean over the last ten steps' samples.
- *margin*: how much more the log-probability of the chosen reply has risen than that of the rejected one, times DPO's
  beta; *pairs right* is the share of held-out pairs in which it has.
- *KL*: to the start, as GRPO logs it if it has a beta.
- *cosine* and *shift*: of refusal directions, and along them, as in the study.
- *time*: of training, on a machine that had other work; it separates long from short, and no more.

The start is a model that [refuses](results.md) and over-refuses: it takes many of the arithmetic problems for something
that it should not help with. So both algorithms are paid for unlearning refusals, on these prompts, and what they do to
refusals of malicious ones is the question."""

LIMITS = """\
- **One small model, short training, few seeds.** Nothing here was seen on a 7B model, in full fine-tuning, or in GRPO
  over thousands of steps. The tables say how many seeds each method has.
- **One task.** Preferences between styles of chat, and rewards from a model, are other pressures.
- **Settings are chosen for this model.** The constraint has the library's defaults; learning rate and length are such
  that plain training loses refusals, as otherwise there is nothing to keep.
- **Refusals by their words**, of short prompts without jailbreaks, as in
  [the study](results.md#what-this-does-not-show)."""
