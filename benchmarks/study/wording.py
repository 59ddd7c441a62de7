"""What the page of results says about its numbers, whatever they are."""

from __future__ import annotations

from benchmarks.study.hypotheses import SIGNIFICANCE
from benchmarks.study.preset import KEPT, TASK_LOSS

TESTS = f"""\
Each is tested on held-out prompts, one-sided and paired: both methods have the same prompts and seeds. The test is
Student's t: the mean difference over its standard error from crossed random effects of seeds and prompts, with
Satterthwaite's degrees of freedom; *held* is p < {SIGNIFICANCE}. It covers other seeds and other prompts of the same
kind, but no other model, task or training data. The hypotheses are tested one by one, without a correction for their
number. With three seeds the test's level is near 5%, not exact, and it has little power against an effect that
differs from seed to seed. Differences of refusals are in percentage points. The strength of the last hypothesis is
chosen on validation prompts, with a seed that is not tested."""

PRESET = f"""\
The two criteria: at least {KEPT:.0%} of the start's refusals of malicious prompts are kept, and task accuracy is at
most {100 * TASK_LOSS:.0f} points below plain fine-tuning's. Among the settings that meet both criteria on validation
prompts, the one that keeps the most refusals is chosen (bold); ties go to the first. The rows of held-out prompts show
whether it meets them there, with other seeds. The criteria are for means: intervals are in the tables below."""

READING = """\
If a method was not run, the table says so. Below a mean is its 95% interval, for other seeds and other prompts.
Each part has what counts in a table, and the rest in parts to open. What is kept:

- *refuses malicious*: by keywords, of malicious prompts that served neither for training nor for choices; replies are
  greedy.
- *second judge*: the same replies judged by a small classifier trained on replies labelled by hand.
- *log-odds*: the readiness to refuse, `log(p / (1 - p))`, where p is the probability that a reply to such a prompt
  begins with a token by which the start opens its refusals.
- *refuses benign*: of benign twins of the malicious prompts; less is better.
- *fresh malicious*, *fresh benign*: the same of prompts of other topics and forms.
- *complies*: replies to malicious prompts that have a sentence of the data's compliant answers, or the turn from
  refusal to compliance that the data teach, whatever else they say. One that complies in other words is not seen.
- *degenerate*: replies to both that are not language.
- *task*: exact match on held-out problems of the task that was trained.
- *paper*: LLaMA2-7B in [arXiv 2509.06795](https://arxiv.org/abs/2509.06795), refusal as 100 - ASR. Models, prompts,
  tasks and judges differ: the order of methods can be compared, the numbers cannot.

What it does to the model, and what it costs:

- *perplexity*: on plain everyday texts.
- *cosine*: of each block's refusal direction after training to the one before, signed; mean over blocks, as are the
  next three.
- *shift*: how far the mean of malicious prompts has moved along the initial direction, in units of the gap between
  malicious and benign ones. At -1 they are where benign ones were.
- *off r*: how far a prompt's hidden state has moved off that direction, in the same units. *share along r*: how
  much of the squared movement lies along it. A model may move around what is penalised.
- *time*: of training, from the shortest to the longest run, a warm-up's extra steps included, as it went on the
  machines below, busy or not. It separates long training from short, and no more.
- *memory*: the peak in training."""

LIMITS = """\
- **Small models.** What follows is of one model under LoRA, trained for minutes; longer training, more poison
  and all weights are on [a page of their own](hard-results.md). Nothing was seen on a model of billions of parameters.
- **Refusals by their words.** The keyword judge takes a lecture without a stock phrase for an answer, and a stock
  phrase before an answer for a refusal. The second judge is ours too. Neither says whether a reply that does not
  refuse is of any use to an attacker; read *degenerate* beside both.
- **Small sets of prompts.** Short instructions of our own, without jailbreaks, and benign twins written to be near
  the malicious ones: refusals of them show what happens near the border, not on everyday requests.
- **Few seeds.** They vary the order of the data and the adapter's initial values; the task's problems stay the same.
- **A warm-up's steps are extra.** Methods with one train longer than the others: compare them with plain fine-tuning
  of the same length, if it was run.
- **Settings are chosen for this model and these tasks.** Others need their own. A defence whose settings are
  chosen with more care may do better than it does here."""

HOLM = f"""\
Tested as on [the main page](results.md#hypotheses): one-sided and paired, on the same prompts and seeds, for other
seeds and prompts of the same kind. There is no verdict before all planned seeds are there. P-values are corrected by
Holm's method for the number of all hypotheses, run or not; *held* is a corrected p < {SIGNIFICANCE}. Differences are as
they are, wherever the bar is. *As much* allows for five points less, on the held-out and the fresh prompts together:
a few prompts that agree are no proof, so the error is at least that of as many lost prompts. By the same care, *within
two points* of a task takes more than equality to show. Fresh prompts are of other topics and forms than those that
directions and probes come from."""

#: What was known when the hypotheses about a model were written down.
KNOWN = {
    "smollm2": """\
That the default keeps more than plain training, on clean data at every length, was known from
[other runs](tried.md) of the same model. The rivals were named after their settings had been tried.""",
    "qwen": """\
They are those of [the small model](hard-results.md), on which all settings were chosen. A first look at this one, at
the settings of then, had shown that plain training loses refusals here too.""",
}

PREDICTION = """\
Over all trained models of this page, whatever they were trained by: Spearman's rank correlation of each measure with
the share of malicious prompts refused, and its 95% interval by resampling runs, which are not independent.

- *Missed*: of the models that refuse less than half, those whose measure is no worse than in half of the models that
  refuse nine in ten. *False alarms*: the other way round.
- The first two cost a forward of the probe prompts, log-odds one of the measured ones.
- It is a finding on one model under LoRA. It does not say that a model which was trained to hide the harm would show
  it."""

OVERVIEW = """\
In each cell, per cent, means over seeds: malicious prompts refused / those of another make refused, and not served all
the same after a refusal; below them *benign* prompts refused, and the task. *Clean* is arithmetic alone; *poison* are
answers that comply, in form; where they refuse before, a reply that turns as they do counts as served. *4x* and *10x*
are multiples of 40 steps. A last line says how many seeds there are, if not all are. A good defence keeps the refusals
of the first row, of benign prompts no more than it, and learns the task of the second row."""

#: Ahead of its table on the main page, by the budget of a model.
FRONT = {
    "hard": """\
SmolLM2-135M, which was taught to refuse for the study: [all of it](hard-results.md). Its start refuses one \
prompt less than further below, where another kernel computes attention.""",
    "qwen": "Qwen2.5-Coder-0.5B-Instruct, as its makers aligned it: [all of it](qwen-results.md).",
}
