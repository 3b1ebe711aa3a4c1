//! The lab's mock DMA devices (`scripts/lab.d/modules`) pass through the kernel's own VFIO to a stock
//! guest, which migrates to and fro between two processes while they write its memory.
//!
//! The guest's checker (`guest_net mock-dma`) notices that it has arrived by the numbers of its
//! devices. Their engines, which wrote until they stopped at the source, rest until it has looked at
//! every page: what a migration has lost is still there to be seen.
//!
//! `FERRY_MOCK_RUNS` says how many migrations there are of each case (1), `FERRY_MOCK_CASES` which
//! (`few`; `all`; else words, of which a case's name must have one), and `FERRY_MOCK_REPORT` to
//! which file results are appended, a line of JSON each. `FERRY_MOCK_STATE_MIB` is the state of the
//! devices whose downtimes with and without pre-copy are compared (16).

mod device;
mod faults;
mod figures;
mod iommufd;

mod matrix;
mod report;
mod rig;
