"""A prediction that the model's thread may answer itself, where it runs alone and its transport lends the socket."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from serving.engine.request import Outcome
from serving.errors import ServingError
from serving.prediction.prediction import Prediction
from serving.prediction.socket_loan import SocketLoan
from serving.protocols.codec import SMALL_ANSWER_BYTES


class DirectPrediction(Prediction):
    """One prediction on a connection of its own transport.

    From `lend` to `recover` the event loop writes nothing to the connection: whatever wants to calls `recover` before.
    """

    __slots__ = ()

    @abstractmethod
    def lend_socket(self) -> SocketLoan | None:
        """Return the right to write the answer; None where something else waits to be written, or is owed before."""

    @abstractmethod
    def render(self, response: Any) -> bytes | None:
        """Write the answer as the socket gets it, on the model's thread; None where the loop has to."""

    @abstractmethod
    def recovered(self, rest: bytes | None) -> None:
        """Do what follows an answer of which all but `rest` is written; None: it is not, and nothing is lent now."""

    def lend(self) -> None:  # noqa: D102
        self.loan = self.lend_socket()

    def answer_from_thread(self, outcome: Outcome) -> None:  # noqa: D102
        loan = self.loan
        if loan is None or isinstance(outcome, ServingError):
            return
        if sum([array.nbytes for array in outcome]) > SMALL_ANSWER_BYTES:
            return
        answer = self.render(self.endpoint.codec.begin_answer(outcome, self.context, self.headers, _unlimited))
        if answer is not None:
            loan.write(answer, outcome)

    def cancel(self) -> None:  # noqa: D102
        if not self.recover():
            super().cancel()

    def recover(self) -> bool:
        """Take the right to write back; return whether the answer is written. Then all that follows it is done too."""
        loan, self.loan = self.loan, None
        if loan is None:
            return False
        rest = loan.recover()
        self.recovered(rest)
        if rest is None:
            return False
        self.answered(loan.outputs)
        return True

    def recover_if_written(self) -> None:
        """Do what follows the answer if the thread has written it; the loop may not have been told yet."""
        if self.loan is not None and self.loan.is_written():
            self.recover()


def _unlimited(size: int) -> bool:
    """Stand for a budget, which small answers do not need."""
    return True
