//! Client and server in one process: every message, its success and its refusal.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::common::{CONFIG, DMA_BY_MESSAGE, DMA_DOORBELL, DMA_RESULT, REGION_SIZE, connected};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user::client::FeatureOperation;
use vfio_user::{
    Area, Client, ClientConfig, ClientError, DeviceFlags, DeviceState, DmaFlags, DmaHandler, Errno,
    Feature, IrqAction, MigrationFlags, PrecopyInfo,
};

fn refused<T>(result: Result<T, ClientError>) -> Errno {
    result
        .err()
        .and_then(|error| error.refused())
        .expect("a refusal by the server")
}

#[test]
fn device_and_regions_are_described() {
    let (client, _, _) = connected(ClientConfig::default());
    let info = client.info().unwrap();
    assert_eq!(info.flags, DeviceFlags::PCI | DeviceFlags::RESET);
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
    let region = client.region_info(0).unwrap();
    assert_eq!(region.size, REGION_SIZE);
    assert!(region.mapping.is_none());
    let mapping = client.region_info(2).unwrap().mapping.unwrap();
    assert_eq!(mapping.offset, 0x1000);
    assert_eq!(
        mapping.areas,
        [Area {
            offset: 0x2000,
            size: 0x1000
        }]
    );
    assert_eq!(client.region_info(5).unwrap().size, 0);
    assert_eq!(refused(client.region_info(9)), Errno::INVAL);
    let bells = client.region_io_fds(0, REGION_SIZE).unwrap();
    assert_eq!((bells[0].offset, bells[0].size), (0x40, 2));
    assert_eq!(bells[0].datamatch, Some(1));
    assert_eq!(client.region_io_fds(1, REGION_SIZE).unwrap().len(), 0);
    assert_eq!(client.irq_info(2).unwrap().count, 200);
    assert_eq!(refused(client.irq_info(5)), Errno::INVAL);
}

#[test]
fn regions_are_read_and_written_in_pieces_that_fit() {
    let (client, _, _) = connected(ClientConfig::default());
    let data: Vec<u8> = (0..2_500_000_u32).map(|n| n.to_le_bytes()[2]).collect();
    client.region_write(0, 0x1000, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(0, 0x1000, &mut back).unwrap();
    assert!(back == data);
    client.region_write(CONFIG, 4, &[1, 2, 3, 4]).unwrap();
    assert_eq!(
        refused(client.region_write(0, REGION_SIZE, &[0])),
        Errno::INVAL
    );
    assert_eq!(
        refused(client.region_read(0, u64::MAX, &mut [0; 1])),
        Errno::INVAL
    );
    assert_eq!(
        refused(client.region_read(99, 0, &mut [0; 4])),
        Errno::INVAL
    );
}

#[test]
fn interrupts_are_set_up_triggered_and_cleared() {
    let (client, shared, _) = connected(ClientConfig::default());
    // More than go into one message.
    let fds: Vec<_> = (0..150)
        .map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap())
        .collect();
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    client.set_irq_eventfds(2, 10, &borrowed).unwrap();
    assert_eq!(shared.lock().irqs.len(), 150);
    client.irq_action(2, 159, 1, IrqAction::Trigger).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&fds[149], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    assert_eq!(
        refused(client.irq_action(2, 0, 1, IrqAction::Mask)),
        Errno::OPNOTSUPP
    );
    assert_eq!(
        refused(client.set_irq_eventfds(2, 199, &borrowed[..2])),
        Errno::INVAL
    );
    client.clear_irqs(2).unwrap();
    assert!(shared.lock().irqs.is_empty());
}

#[test]
fn the_device_writes_mapped_memory_and_its_log_says_so() {
    let (client, _, _) = connected(ClientConfig::default());
    let memory = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 1 << 20).unwrap();
    let both = DmaFlags::READ | DmaFlags::WRITE;
    let file = Some((memory.as_fd(), 0x1_0000));
    client.dma_map(0x10_0000, 0x8_0000, both, file).unwrap();
    assert_eq!(
        refused(client.dma_map(0x10_0000, 0x8_0000, both, file)),
        Errno::EXIST
    );
    assert_eq!(refused(client.dma_map(0, 0, both, file)), Errno::INVAL);
    assert_eq!(
        refused(client.dma_map(u64::MAX, 2, both, None)),
        Errno::OVERFLOW
    );
    let range = Area {
        offset: 0x10_0000,
        size: 0x8_0000,
    };
    let page = client.start_dma_logging(4096, &[range]).unwrap();
    assert_eq!(page, 4096);
    client.region_write(0, 0, b"hello").unwrap();
    let target = 0x10_5000_u64;
    client
        .region_write(0, DMA_DOORBELL, &target.to_le_bytes())
        .unwrap();
    let mut seen = [0; 5];
    rustix::io::pread(&memory, &mut seen, 0x1_5000).unwrap();
    assert_eq!(&seen, b"hello");

    let mut words = [1 << 63, 0];
    client
        .report_dma_log(0x10_0000, 0x8_0000, page, &mut words)
        .unwrap();
    assert_eq!(words, [1 << 63 | 1 << 5, 0], "bits are OR-ed in");
    words = [0; 2];
    client
        .report_dma_log(0x10_0000, 0x8_0000, page, &mut words)
        .unwrap();
    assert_eq!(words, [0; 2], "a report clears");
    client.stop_dma_logging().unwrap();
    client.stop_dma_logging().unwrap();
    assert_eq!(refused(client.dma_unmap(0x10_0000, 1)), Errno::NOENT);
    client.dma_unmap(0x10_0000, 0x8_0000).unwrap();
    assert_eq!(
        refused(client.region_write(0, DMA_DOORBELL, &target.to_le_bytes())),
        Errno::FAULT
    );
}

#[test]
fn bad_log_requests_are_refused_with_the_kernels_errnos() {
    let (client, _, _) = connected(ClientConfig::default());
    let area = |offset, size| Area { offset, size };
    let start = |page, ranges: &[Area]| refused(client.start_dma_logging(page, ranges));
    assert_eq!(start(3000, &[area(0, 4096)]), Errno::INVAL);
    assert_eq!(start(0, &[area(0, 4096)]), Errno::INVAL);
    assert_eq!(start(4096, &[area(0, 0)]), Errno::INVAL);
    assert_eq!(start(4096, &[area(100, 4096)]), Errno::INVAL);
    assert_eq!(
        start(4096, &[area(0x4000, 0x2000), area(0, 0x5000)]),
        Errno::INVAL
    );
    assert_eq!(
        start(4096, &[area(0xffff_ffff_ffff_f000, 0x1000)]),
        Errno::OVERFLOW
    );
    let report = |iova, len, page, words: &mut [u64]| client.report_dma_log(iova, len, page, words);
    assert_eq!(refused(report(0, 4096, 4096, &mut [0])), Errno::INVAL);
    client.start_dma_logging(4096, &[area(0, 4096)]).unwrap();
    assert_eq!(start(4096, &[area(0, 4096)]), Errno::INVAL);
    assert_eq!(refused(report(0, 512, 512, &mut [0])), Errno::INVAL);
    assert_eq!(
        refused(report(u64::MAX - 4095, 8192, 4096, &mut [0])),
        Errno::OVERFLOW
    );
    assert!(matches!(
        report(0, 4096, 4096, &mut [0; 2]),
        Err(ClientError::Argument { .. })
    ));
    assert!(matches!(
        client.start_dma_logging(4096, &vec![area(0, 4096); 257]),
        Err(ClientError::Argument { .. })
    ));
}

#[test]
fn a_device_migrates_to_another() {
    let (source, source_seen, _) = connected(ClientConfig::default());
    let (target, target_seen, _) = connected(ClientConfig::default());
    assert_eq!(
        source.migration_flags().unwrap(),
        Some(MigrationFlags::all())
    );
    assert_eq!(source.device_state().unwrap(), DeviceState::Running);
    assert_eq!(source.stop_copy_size().unwrap(), Some(3_000_000));
    let mut buffer = vec![0; source.server().data_xfer()];
    assert_eq!(
        refused(source.read_migration_data(&mut buffer)),
        Errno::INVAL,
        "not while it just runs"
    );
    assert_eq!(source.precopy_info().unwrap(), None);
    source.set_device_state(DeviceState::PreCopy).unwrap();
    let info = PrecopyInfo {
        initial_bytes: 3_000_000,
        dirty_bytes: 5,
        reinit: true,
    };
    assert_eq!(source.precopy_info().unwrap(), Some(info));
    source.set_device_state(DeviceState::StopCopy).unwrap();
    assert_eq!(refused(target.write_migration_data(b"x")), Errno::INVAL);
    target.set_device_state(DeviceState::Resuming).unwrap();
    let mut total = 0;
    loop {
        let got = source.read_migration_data(&mut buffer).unwrap();
        target.write_migration_data(&buffer[..got]).unwrap();
        total += got;
        if got < buffer.len() {
            break;
        }
    }
    assert_eq!(total, 3_000_000);
    source.set_device_state(DeviceState::Stop).unwrap();
    target.set_device_state(DeviceState::Running).unwrap();
    assert_eq!(target.device_state().unwrap(), DeviceState::Running);
    let expected: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    assert!(target_seen.lock().loaded == expected);
    use DeviceState as S;
    assert_eq!(
        source_seen.lock().arcs,
        [
            (S::Running, S::PreCopy),
            (S::PreCopy, S::PreCopyP2p),
            (S::PreCopyP2p, S::StopCopy),
            (S::StopCopy, S::Stop),
        ]
    );
}

#[test]
fn impossible_states_are_refused_and_broken_devices_are_reset() {
    let (client, seen, _) = connected(ClientConfig::default());
    client.set_device_state(DeviceState::StopCopy).unwrap();
    assert_eq!(
        refused(client.set_device_state(DeviceState::PreCopy)),
        Errno::INVAL
    );
    assert_eq!(
        refused(client.set_device_state(DeviceState::Error)),
        Errno::INVAL
    );
    client.set_device_state(DeviceState::Resuming).unwrap();
    client.write_migration_data(b"bad").unwrap();
    assert_eq!(
        refused(client.set_device_state(DeviceState::Running)),
        Errno::BADMSG
    );
    assert_eq!(client.device_state().unwrap(), DeviceState::Error);
    assert_eq!(
        refused(client.set_device_state(DeviceState::Running)),
        Errno::INVAL
    );
    client.reset().unwrap();
    assert_eq!(client.device_state().unwrap(), DeviceState::Running);
    assert_eq!(seen.lock().resets, 1);
}

#[test]
fn features_can_be_probed() {
    let (client, _, _) = connected(ClientConfig::default());
    use FeatureOperation::{Get, Set};
    for (feature, get, set) in [
        (Feature::Migration, true, false),
        (Feature::MigDeviceState, true, true),
        (Feature::DmaLoggingStart, false, true),
        (Feature::DmaLoggingStop, false, true),
        (Feature::DmaLoggingReport, true, false),
        (Feature::MigDataSize, true, false),
        (Feature::MigPrecopyInfo, true, false),
    ] {
        assert_eq!(client.probe_feature(feature, Get).unwrap(), get);
        assert_eq!(client.probe_feature(feature, Set).unwrap(), set);
    }
}

#[test]
fn a_device_error_is_the_clients_error_for_every_message() {
    let (client, shared, _) = connected(ClientConfig::default());
    client.set_device_state(DeviceState::StopCopy).unwrap();
    shared.lock().fail = Some(Errno::NOSPC);
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let all = DmaFlags::all();
    let range = Area {
        offset: 0,
        size: 4096,
    };
    for errno in [
        refused(client.region_info(0)),
        refused(client.region_io_fds(0, REGION_SIZE)),
        refused(client.irq_info(2)),
        refused(client.set_irq_eventfds(2, 0, &[event.as_fd()])),
        refused(client.region_read(0, 0, &mut [0; 4])),
        refused(client.region_write(0, 0, &[0; 4])),
        refused(client.dma_map(0, 4096, all, None)),
        refused(client.dma_unmap(0, 4096)),
        refused(client.reset()),
        refused(client.set_device_state(DeviceState::Stop)),
        refused(client.start_dma_logging(4096, &[range])),
        refused(client.stop_dma_logging()),
        refused(client.read_migration_data(&mut [0; 4])),
    ] {
        assert_eq!(errno, Errno::NOSPC);
    }
    shared.lock().fail = None;
    client.set_device_state(DeviceState::Resuming).unwrap();
    client.start_dma_logging(4096, &[range]).unwrap();
    shared.lock().fail = Some(Errno::NOSPC);
    assert_eq!(refused(client.write_migration_data(&[1])), Errno::NOSPC);
    assert_eq!(
        refused(client.report_dma_log(0, 4096, 4096, &mut [0])),
        Errno::NOSPC
    );
    // The connection is as good as ever.
    shared.lock().fail = None;
    client.reset().unwrap();
}

#[derive(Default)]
struct Memory(Mutex<Vec<u8>>);

impl DmaHandler for Memory {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(iova).unwrap();
        let memory = self.0.lock();
        data.copy_from_slice(memory.get(at..at + data.len()).ok_or(Errno::FAULT)?);
        Ok(())
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(iova).unwrap();
        let mut memory = self.0.lock();
        memory
            .get_mut(at..at + data.len())
            .ok_or(Errno::FAULT)?
            .copy_from_slice(data);
        Ok(())
    }
}

#[test]
fn the_server_reaches_memory_by_message() {
    let memory = Arc::new(Memory(Mutex::new(b"........deadbeef________".to_vec())));
    let (client, _, _) = connected(ClientConfig {
        dma: Some(Arc::clone(&memory) as Arc<dyn DmaHandler>),
        ..ClientConfig::default()
    });
    let go = |at: u64| client.region_write(0, DMA_BY_MESSAGE, &at.to_le_bytes());
    // Memory that is there, but not mapped for the device, or only for reading.
    assert_eq!(refused(go(8)), Errno::FAULT);
    client.dma_map(0, 0x1000, DmaFlags::READ, None).unwrap();
    assert_eq!(refused(go(8)), Errno::ACCESS);
    assert_eq!(memory.0.lock().as_slice(), b"........deadbeef________");
    client.dma_unmap(0, 0x1000).unwrap();
    client.dma_map(0, 0x1000, DmaFlags::all(), None).unwrap();
    go(8).unwrap();
    let mut result = [0; 8];
    client.region_read(0, DMA_RESULT, &mut result).unwrap();
    assert_eq!(&result, b"deadbeef");
    assert_eq!(memory.0.lock().as_slice(), b"........deadbeefdeadbeef");
    // An error of the handler arrives at the device, and here as the device's.
    assert_eq!(refused(go(1000)), Errno::FAULT);
    // What was taken away is out of reach.
    client.dma_unmap(0, 0x1000).unwrap();
    assert_eq!(refused(go(8)), Errno::FAULT);
}

#[test]
fn without_a_handler_the_server_is_refused_memory() {
    let (client, _, _) = connected(ClientConfig::default());
    assert_eq!(
        refused(client.region_write(0, DMA_BY_MESSAGE, &[0; 8])),
        Errno::NOTSUP
    );
}

#[test]
fn many_threads_share_a_client() {
    let (client, _, _) = connected(ClientConfig::default());
    let client = &client;
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            scope.spawn(move || {
                for round in 0..200_u64 {
                    let value = (thread << 32 | round).to_le_bytes();
                    let at = 0x1000 + thread * 8;
                    client.region_write(0, at, &value).unwrap();
                    let mut back = [0; 8];
                    client.region_read(0, at, &mut back).unwrap();
                    assert_eq!(back, value);
                }
            });
        }
    });
}

#[test]
fn a_client_that_leaves_detaches_and_resets_the_device() {
    let (client, shared, served) = connected(ClientConfig::default());
    client.dma_map(0, 4096, DmaFlags::all(), None).unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    client.set_irq_eventfds(2, 0, &[event.as_fd()]).unwrap();
    drop(client);
    served.join().unwrap().unwrap();
    let shared = shared.lock();
    assert_eq!((shared.detached, shared.resets), (1, 1));
    assert!(shared.mappings.is_empty() && shared.irqs.is_empty());
}

#[test]
fn a_client_is_send_and_sync() {
    fn check<T: Send + Sync>() {}
    check::<Client>();
}
