"""Copies ahead of their use: right in every order in which two streams may do what they are given.

There is no stream on a CPU. Here two pretended ones note what they are given, and all orders that
their events allow are tried out.
"""

from collections.abc import Iterator

import pytest
import torch

from hesscurv.linalg import transfers
from hesscurv.linalg.transfers import CopyStream, pipelined, prefetched

CPU = torch.device("cpu")
REUSED = -7.0  # what the memory of freed buffers is filled with


class Noting:
    """A stream that only notes its work: functions, events that come and events to wait for.

    `deaf`: It does not wait, as a program that forgot to let it.
    """

    def __init__(self, deaf=False):
        self.work, self.deaf = [], deaf

    def record_event(self):
        event = object()
        self.work.append(("record", event))
        return event

    def wait_event(self, event):
        assert event is not None
        if not self.deaf:
            self.work.append(("wait", event))

    def launch(self, function):
        self.work.append(("run", function))

    def copy_(self, target, source):
        self.launch(lambda: target.copy_(source))


def orders(*streams: Noting) -> Iterator[list]:
    """All orders in which streams may run their functions."""

    def advance(places, come):
        """Pass all events that have come: to do so at once leaves every other order open."""
        places, come, moved = list(places), set(come), True
        while moved:
            moved = False
            for s, stream in enumerate(streams):
                while places[s] < len(stream.work):
                    kind, what = stream.work[places[s]]
                    if kind == "run" or (kind == "wait" and what not in come):
                        break
                    if kind == "record":
                        come.add(what)
                    places[s] += 1
                    moved = True
        return places, come

    def further(places, come, done):
        places, come = advance(places, come)
        left = [s for s, stream in enumerate(streams) if places[s] < len(stream.work)]
        if not left:
            yield done
            return
        ready = [s for s in left if streams[s].work[places[s]][0] == "run"]
        assert ready, "the streams wait for each other"
        for s in ready:
            function = streams[s].work[places[s]][1]
            after = [p + (t == s) for t, p in enumerate(places)]
            yield from further(after, come, [*done, function])

    return further([0] * len(streams), set(), [])


def chunks_of(count, rows=2):
    return [torch.full((rows, 3 + i % 2), float(i + 1)) for i in range(count)]


def outcomes(chunks, uses=None, main=None, copies=None, fails_at=None):
    """What the uses of the chunks saw, and the buffers at the end, in every order.

    The memory of the buffers is used again as soon as the iterator has ended.
    """
    main, copies = main or Noting(), copies or Noting()
    buffers = [torch.full((8,), float("nan")) for _ in range(2)]
    seen = {}

    def use(i, part):
        main.launch(lambda: seen.__setitem__(i, part.clone()))

    if fails_at is not None:
        copy_ = copies.copy_

        def failing(target, source):
            copy_(target[:1], source[:1])  # a row is on its way already
            if source is chunks[fails_at]:
                raise RuntimeError("the copy failed")
            copy_(target[1:], source[1:])

        copies.copy_ = failing
    parts = pipelined(chunks, buffers, main, copies)
    for i, part in enumerate(parts):
        use(i, part)
        if i + 1 == uses:
            break
    parts.close()
    for buffer in buffers:
        main.launch(lambda buffer=buffer: buffer.fill_(REUSED))
    for order in orders(main, copies):
        for buffer in buffers:
            buffer.fill_(float("nan"))
        seen.clear()
        for function in order:
            function()
        yield dict(seen), [buffer.clone() for buffer in buffers]


def is_right(chunks, uses, found):
    seen, buffers = found
    return (
        sorted(seen) == list(range(uses))
        and all(torch.equal(seen[i], chunks[i]) for i in seen)
        and all(bool((buffer == REUSED).all()) for buffer in buffers)
    )


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6])
def test_every_chunk_is_whole_when_used_and_stays_until_then(count):
    chunks = chunks_of(count)
    found = list(outcomes(chunks))
    assert all(is_right(chunks, count, one) for one in found)
    # The next chunk is copied before, or after, this one is used: there is something to gain.
    assert len(found) >= max(1, 2 ** (count - 1))


@pytest.mark.parametrize("uses", [1, 2, 3, 4])
def test_a_consumer_that_leaves_early_frees_no_buffer_under_a_copy(uses):
    chunks = chunks_of(5)
    found = list(outcomes(chunks, uses))
    assert all(is_right(chunks, uses, one) for one in found)


def test_a_generator_that_is_dropped_by_an_error_waits_for_its_copies():
    main, copies = Noting(), Noting()
    buffers = [torch.zeros(8) for _ in range(2)]

    def consume():
        for _ in pipelined(chunks_of(4), buffers, main, copies):
            raise KeyError("the consumer's own")

    with pytest.raises(KeyError):
        consume()
    for buffer in buffers:
        main.launch(lambda buffer=buffer: buffer.fill_(REUSED))
    for order in orders(main, copies):
        for function in order:
            function()
        assert all(bool((buffer == REUSED).all()) for buffer in buffers)


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_a_copy_that_fails_half_way_leaves_none_behind(fails_at):
    chunks, main, copies = chunks_of(4), Noting(), Noting()
    with pytest.raises(RuntimeError, match="the copy failed"):
        list(outcomes(chunks, main=main, copies=copies, fails_at=fails_at))
    main.launch(lambda: None)  # what uses the memory of the buffers next
    made = [what for kind, what in copies.work if kind == "run"]
    for order in orders(main, copies):
        assert all(order.index(copy) < len(order) - 1 for copy in made)
        assert order[-1] is main.work[-1][1]


@pytest.mark.parametrize("deaf", ["main", "copies"])
@pytest.mark.parametrize("uses", [None, 2])
def test_a_stream_that_does_not_wait_is_found_out(deaf, uses):
    """The orders tried out do include the wrong ones."""
    chunks = chunks_of(5)
    found = list(outcomes(chunks, uses, **{deaf: Noting(deaf=True)}))
    assert not all(is_right(chunks, uses or 5, one) for one in found)


def test_on_a_cpu_chunks_are_handed_through():
    chunks = [torch.randn(3, 4)[:, 1:3] for _ in range(3)]
    for got, chunk in zip(prefetched(iter(chunks), CPU, torch.float32), chunks, strict=True):
        assert got is chunk


def test_on_a_cpu_chunks_are_read_one_at_a_time():
    """As late as a loop would: what comes before a chunk may change it."""
    x = torch.zeros(3, 2)
    parts = prefetched((x[i] for i in range(3)), CPU, torch.float64)
    for i, part in enumerate(parts):
        assert part.dtype == torch.float64
        assert part.tolist() == [i, i]
        x[i + 1 :] += 1


def test_without_pinned_memory_there_are_no_buffers():
    assert transfers._buffers([torch.randn(2, 3)], CPU) == []
    assert transfers._buffers([torch.randn(2, 0)], CPU) == []
    assert transfers._buffers([], CPU) == []


class Rows(torch.Tensor):
    """Rows that note which streams their memory is kept for."""

    def record_stream(self, stream):
        self.kept_for = [*getattr(self, "kept_for", []), stream]


def test_rows_are_stored_after_they_were_computed(monkeypatch):
    main, side = Noting(), Noting()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(
        CopyStream, "copy_", lambda self, target, source: side.copy_(target, source)
    )
    copies = CopyStream(torch.device("cuda", 0))
    rows = torch.zeros(3, 4).as_subclass(Rows)
    targets = [torch.zeros(1, 4), torch.zeros(2, 4)]
    main.launch(lambda: rows.fill_(1))
    copies.store_(targets, rows)
    main.launch(lambda: None)  # the next product
    found = list(orders(main, side))
    assert len(found) == 3  # it may come before, between and after the two copies
    for order in found:
        for each in (rows, *targets):
            each.zero_()
        for function in order:
            function()
        assert all(bool((target == 1).all()) for target in targets)
    assert rows.kept_for == [side]
