"""`SlotTable`: the device slots of a worker, and the programs in them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from deltamux.deltas import KVPrefix
from deltamux.engine.vllm.eviction import EvictionPolicy
from deltamux.engine.vllm.layers.binding import ModulePlacement


class PreparedProgram(NamedTuple):
    """A program as it is loaded into a slot.

    Attributes:
        placements: its ops by module.
        prefix: keys and values by attention, where none has to be computed; see `prefixes.known_prefix`.
    """

    placements: tuple[ModulePlacement, ...]
    num_virtual_tokens: int
    num_bytes: int
    prefix: Mapping[str, KVPrefix] | None


EMPTY = PreparedProgram((), 0, 0, None)


class SlotTable:
    """The program of each device slot; a full table evicts the program that is worth least (see `eviction`).

    Attributes:
        slots: slot by program id, in the order in which the programs came.
        version: another number after each change.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots: dict[int, int] = {}
        self.version = 0
        self._policy: EvictionPolicy[int] = EvictionPolicy(num_slots)
        self._programs = [EMPTY] * num_slots
        self._pinned: set[int] = set()

    def __getitem__(self, slot: int) -> PreparedProgram:
        """Returns the program in a slot; `EMPTY` where there is none."""
        return self._programs[slot]

    def __iter__(self) -> Iterator[PreparedProgram]:
        return iter(self._programs)

    def pin(self, program_id: int, pinned: bool) -> None:
        """Keeps a program in its slot as long as any other can be evicted, or no longer."""
        (self._pinned.add if pinned else self._pinned.discard)(program_id)
        if program_id in self.slots:
            self._policy.pin(program_id, pinned)

    def use(self, program_id: int, prepare: Callable[[], PreparedProgram], needed: Collection[int]) -> int | None:
        """Counts a use of a program, which is loaded into a slot if it has none.

        Args:
            prepare: returns the program; called only where it is loaded.
            needed: ids of the programs of the step, which are not evicted.
        Returns:
            the slot if the program was loaded, None if it had one.
        """
        self._policy.use(program_id)
        if program_id in self.slots:
            return None
        slot = self._free_slot(needed)
        program = prepare()
        self.slots[program_id] = slot
        self._policy.pin(program_id, program_id in self._pinned)
        self._policy.set_cost(program_id, program.num_bytes)
        for module, groups in program.placements:
            module.set(slot, groups)
        self._programs[slot] = program
        self.version += 1
        return slot

    def evict(self, program_id: int) -> None:
        """Empties a program's slot; one that has none may be evicted."""
        slot = self.slots.pop(program_id, None)
        self._policy.remove(program_id)
        if slot is not None:
            for module, _ in self._programs[slot].placements:
                module.reset(slot)
            self._programs[slot] = EMPTY
            self.version += 1

    def _free_slot(self, needed: Collection[int]) -> int:
        if len(self.slots) == self.num_slots:
            victim = self._policy.victim(needed)
            if victim is None:
                victim = self._policy.victim(needed, pinned_too=True)
            assert victim is not None  # the scheduler plans no step with more programs than slots
            self.evict(victim)
        taken = set(self.slots.values())
        return next(slot for slot in range(self.num_slots) if slot not in taken)
