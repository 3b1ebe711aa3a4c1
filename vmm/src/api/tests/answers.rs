//! Requests that have an answer if there is something to say.

use super::*;

#[test]
fn a_new_device_has_a_place_if_there_is_a_guest() {
    let fixture = Fixture::new();
    let ask = || {
        let client = fixture.client();
        thread::spawn(move || {
            let device = json!({"path": "/sys/x"});
            client.put_for::<PciDeviceInfo>("vm.add-device", &device)
        })
    };
    let info = PciDeviceInfo {
        id: "_vfio0".to_owned(),
        bdf: "0000:00:1a.0".to_owned(),
    };
    let answer = ask();
    let reply = ApiReply::Device(info.clone());
    fixture.next().1.respond(Ok(reply));
    assert_eq!(answer.join().unwrap().unwrap(), Some(info));
    let answer = ask();
    fixture.next().1.respond(Ok(ApiReply::Empty));
    assert_eq!(answer.join().unwrap().unwrap(), None);
}

#[test]
fn a_migration_that_starts_says_what_it_learns_writes_from() {
    let document: Value = serde_json::from_str(include_str!("../openapi.json")).unwrap();
    let fixture = Fixture::new();
    let client = fixture.client();
    let asked = thread::spawn(move || {
        let send = SendMigrationConfig::new("unix:/x");
        client.put_for::<SendMigrationInfo>("vm.send-migration", &send)
    });
    let info = SendMigrationInfo {
        dirty_sources: vec![DirtySourceInfo {
            id: "nic".to_owned(),
            source: "device DMA log".to_owned(),
            why: "it has one".to_owned(),
        }],
    };
    let json = serde_json::to_value(&info).unwrap();
    let known = &document["components"]["schemas"]["SendMigrationInfo"]["properties"];
    let known = &known["dirty_sources"]["items"]["properties"];
    let device = json["dirty_sources"][0].as_object().unwrap();
    assert!(device.keys().all(|key| known.get(key).is_some()));
    fixture
        .next()
        .1
        .respond(Ok(ApiReply::Sending(info.clone())));
    assert_eq!(asked.join().unwrap().unwrap(), Some(info));
}
