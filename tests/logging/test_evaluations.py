"""Losses before and after training: of one text, or not compared."""

from dga_scale.logging.evaluations import before_and_after, history
from tests.helpers.evaluations import evaluation


def test_the_base_and_the_last_evaluation_are_compared() -> None:
    records = [
        evaluation(0, domain=4.0, general=3.0),
        {"step": 1, "loss/total": 9.0},
        evaluation(5, domain=3.5, general=3.2),
        evaluation(9, domain=3.0, general=3.1),
    ]
    assert before_and_after(records) == {"domain_loss": (4.0, 3.0), "general_loss": (3.0, 3.1)}
    assert before_and_after(records, until=6) == {"domain_loss": (4.0, 3.5), "general_loss": (3.0, 3.2)}
    assert history(records, "domain") == [(0, 4.0), (5, 3.5), (9, 3.0)]


def test_where_only_the_base_was_evaluated_there_is_nothing_to_compare() -> None:
    assert before_and_after([evaluation(0, domain=4.0)]) == {}
    assert before_and_after([evaluation(0, domain=4.0), evaluation(5, domain=3.0)], until=4) == {}
    assert before_and_after([]) == {}


def test_another_text_or_other_rows_of_it_are_not_compared() -> None:
    first = evaluation(0, domain=4.0, general=3.0)
    assert before_and_after([first, evaluation(9, rows=11, domain=3.0)]) == {"domain_loss": (None, 3.0)}
    other = evaluation(9, texts={"domain": "another"}, domain=3.0, general=3.1)
    assert before_and_after([first, other]) == {"domain_loss": (None, 3.0), "general_loss": (3.0, 3.1)}
    assert history([first, other], "domain") == [(9, 3.0)]


def test_what_a_later_evaluation_of_another_text_left_is_not_taken_for_the_base() -> None:
    """The base is the model at step 0, not that of the first evaluation of the text."""
    texts = {"domain": "another"}
    records = [
        evaluation(0, domain=4.0),
        evaluation(5, texts=texts, domain=3.5),
        evaluation(9, texts=texts, domain=3.0),
    ]
    assert before_and_after(records) == {"domain_loss": (None, 3.0)}


def test_a_text_is_known_again_under_another_name() -> None:
    base = evaluation(0, domain=4.0, law=5.0)
    last = evaluation(9, texts={"domain": "law"}, domain=3.0)
    assert before_and_after([base, last]) == {"domain_loss": (5.0, 3.0)}


def test_an_evaluation_of_the_base_counts_wherever_it_stands_in_the_log() -> None:
    records = [evaluation(5, domain=3.5), evaluation(0, domain=4.0), evaluation(9, domain=3.0)]
    assert before_and_after(records) == {"domain_loss": (4.0, 3.0)}
    assert history(records, "domain") == [(0, 4.0), (5, 3.5), (9, 3.0)]
