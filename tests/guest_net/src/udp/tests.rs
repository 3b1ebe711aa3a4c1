use super::*;

fn packet(number: u64) -> Vec<u8> {
    [&MAGIC[..], &number.to_be_bytes(), b"payload"].concat()
}

#[test]
fn losses_duplicates_and_reorderings_are_counted() {
    let mut numbers = Numbers::default();
    for number in [0, 1, 5, 3, 3, 200, 5] {
        numbers.packet(&packet(number));
    }
    assert_eq!(
        (numbers.received, numbers.end, numbers.lost()),
        (5, 201, 196)
    );
    assert_eq!(
        (numbers.duplicates, numbers.reordered, numbers.foreign),
        (2, 1, 0)
    );
}

#[test]
fn foreign_packets_are_not_counted_as_ours() {
    let mut numbers = Numbers::default();
    numbers.packet(b"");
    numbers.packet(b"ferrynet");
    numbers.packet(b"ferrynex\0\0\0\0\0\0\0\0");
    numbers.packet(&packet(MAX_NUMBERS));
    numbers.packet(&packet(u64::MAX));
    assert_eq!(
        (numbers.received, numbers.foreign, numbers.lost()),
        (0, 5, 0)
    );
    numbers.packet(&packet(MAX_NUMBERS - 1));
    assert_eq!((numbers.received, numbers.lost()), (1, MAX_NUMBERS - 1));
}
