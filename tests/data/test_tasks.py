import pytest

from jaxft.data.tasks import TASKS, Slot, get_task, template_parts, with_prompt

PAPER_TASKS = "sst2 sst5 mr cr mpqa subj trec agnews mnli snli qnli rte mrpc qqp".split()  # noqa: SIM905


def test_the_fourteen_tasks_and_the_generated_one_are_there():
    assert set(TASKS) == {*PAPER_TASKS, "reviews"}
    assert sum(TASKS[name].pair for name in PAPER_TASKS) == 6


@pytest.mark.parametrize("name", TASKS)
def test_every_default_prompt_passes_its_own_check(name):
    task = TASKS[name]
    assert with_prompt(task, template=task.template, label_words=task.label_words) == task
    assert task.classes == len(task.label_names)


@pytest.mark.parametrize(
    ("name", "label", "word"),
    [
        ("rte", "entailment", "Yes"),
        ("qnli", "not_entailment", "No"),
        ("mnli", "contradiction", "No"),
        ("snli", "neutral", "Maybe"),
        ("mrpc", "equivalent", "Yes"),
        ("qqp", "not_duplicate", "No"),
        ("sst2", "positive", "great"),
        ("sst5", "neutral", "okay"),
        ("trec", "ABBR", "Expression"),
        ("agnews", "sci/tech", "tech"),
    ],
)
def test_a_named_class_has_the_word_that_means_it(name, label, word):
    task = get_task(name)
    assert task.label_words[task.label_names.index(label)] == word


def test_an_override_changes_the_prompt_alone():
    task = with_prompt(get_task("rte"), template="{b} ? {mask} . {a}")
    assert task.template == "{b} ? {mask} . {a}"
    assert (task.label_words, task.label_names, task.max_tokens) == (("Yes", "No"), get_task("rte").label_names, 256)


def test_parts_join_to_the_template():
    for task in TASKS.values():
        parts = [f"{p.lead}{{{p.name}}}" if isinstance(p, Slot) else p for p in template_parts(task.template)]
        assert "".join(parts) == task.template
