# SPDX-License-Identifier: Apache-2.0
"""Two real nodes under faults: of processes, of the network between them, of the disks below them."""
