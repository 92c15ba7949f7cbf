# SPDX-License-Identifier: Apache-2.0
"""Rare situations that the seeds of `make test` must reach; one that is never reached is a hole in the generator.

`Run.sometimes(name)` counts them; a name that is not here is a mistake of the simulator.
"""

from __future__ import annotations

from typing import Final

SITUATIONS: Final[dict[str, str]] = {
    # --- crashes
    "kill while SyncTarget": "the target of a resync is killed in the middle of it",
    "power cut while SyncTarget": "the target loses power, with what it had not flushed",
    "kill while SyncSource": "the source of a resync is killed in the middle of it",
    "power cut while SyncSource": "the source loses power in the middle of a resync",
    "crash in a round": "a node dies while the copies are being compared",
    "both killed": "both processes die at the same moment",
    "both power-cut": "both machines lose power at the same moment",
    "both power-cut in a metadata write": "... while one of them writes its superblock, activity log or bitmap",
    "power cut in an activity log transaction": "the Primary dies between asking for a hot extent and having it",
    "power cut in a bitmap write-out": "pages of the bitmap are on their way to the disk",
    "crash in a promotion": "a node dies between `primary` and its answer",
    "crash in a demotion": "a node dies between `secondary` and its answer",
    "crash in an attach": "a node dies before it has read and settled its metadata",
    "last good copy lost power": "only what was flushed must be there",
    "a write was torn": "a power cut kept some sectors of a write and lost others",
    "fenced": "the Primary is fenced and the other node promoted",
    "crash again before the resync ended": "a node dies twice in one repair",
    # --- the network
    "link lost between a write and its acknowledgement": "the Primary cannot know whether the peer has it",
    "last message of a resync lost": "the target believes that it is UpToDate, the source does not know",
    "link lost in the bitmap exchange": "one side has the other's bits, the other not",
    "resync interrupted by the network": "it goes on where it was",
    "handshake cut": "the link ends between HELLO and AGREE",
    "reset in the middle of a frame": "a part of a frame has arrived",
    "damaged frame refused": "a byte that TCP's checksum let pass is caught",
    "half-open link replaced": "a new connection comes while the old one is believed to be alive",
    "silent peer given up": "a peer that answers nothing is dropped by its timeout",
    "partition": "nodes cannot connect",
    # --- disks
    "gone on diskless": "the Primary's disk fails and it goes on through the peer",
    "read from the peer": "a block that cannot be read here is read there",
    "write failed at the Secondary": "its copy is left behind and marked",
    "flush failed": "a disk that does not flush is given up",
    "metadata write failed": "a disk whose metadata cannot be written is given up",
    "frozen disk": "nothing completes for a while",
    "rotten bitmap page": "it counts as all dirty",
    "rotten superblock": "the other copy is used, or attach refuses",
    "rotten activity log": "all extents count as hot, or an older transaction is enough",
    "attach refused": "metadata that cannot be trusted",
    "disk replaced": "a blank disk with fresh metadata gets a full sync",
    # --- resync
    "full sync": "every block is copied",
    "write into a running resync": "an application write meets the copy of the same volume",
    "read on an Inconsistent Primary": "a Primary that is SyncTarget serves reads",
    "resync paused": "and goes on",
    "invalidated": "a good copy is thrown away and copied anew",
    "both went on alone": "two histories, and both nodes say so",
    "stale node came back": "after a long absence it became the target",
    "crashed Primary became the target": "its peer went on without it",
    "crashed Primary stayed the source": "nobody went on without it",
    "survivor was the source": "the Secondary of a lost Primary was believed rather than it",
    "forced promotion": "of a copy that is not UpToDate",
    # --- roles
    "switch over": "demoted here, promoted there",
    "two promotions raced": "one of them won, or neither",
    "demotion with writes in flight": "they end before the answer",
    "zombie Primary": "a stopped Primary wakes up after its peer gave it up",
    # --- protocols
    "a suffix was lost": "protocol A: the survivor lacks the newest acknowledged writes, without a hole",
    "write waited for a hot extent": "an extent was evicted for it",
    "write waited for a fork point": "the first write without the peer begins a generation",
    "clock jumped over a timeout": "a deadline passed at once",
}
