"""An object that vLLM has built becomes one of ours, and keeps what it has."""

from vitcop_vllm.adoption import adopt, adopt_copy, adopt_with


class Built:
    def __init__(self, value: int) -> None:
        self.value = value

    def answer(self) -> int:
        return self.value


class Other(Built):
    def answer(self) -> int:
        return -super().answer()


class Ours(Built):
    def answer(self) -> int:
        return 10 * super().answer()


def test_every_reference_to_an_adopted_object_sees_the_subclass():
    holder = [Built(2)]
    assert adopt(holder[0], Ours) is holder[0]
    assert holder[0].answer() == 20


def test_a_copy_is_adopted_and_the_original_stays():
    original = Built(2)
    copy = adopt_copy(original, Ours)
    assert type(copy) is Ours
    assert copy.answer() == 20
    assert type(original) is Built
    copy.value = 3
    assert original.answer() == 2


def test_a_mixin_comes_before_the_class_that_the_object_has():
    original = Other(2)
    adopted = adopt_with(original, Ours)
    assert adopted is original
    assert isinstance(adopted, Other)
    assert adopted.answer() == -20
    assert Other(2).answer() == -2
