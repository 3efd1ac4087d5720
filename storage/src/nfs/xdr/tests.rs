use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn what_is_written_is_read(
        (number, hyper, flag) in any::<(u32, u64, bool)>(),
        (fixed, opaque) in any::<([u8; 5], Vec<u8>)>(),
        array in prop::collection::vec(any::<u64>(), 0..5),
    ) {
        let mut writer = Writer::default();
        number.put(&mut writer);
        hyper.put(&mut writer);
        flag.put(&mut writer);
        fixed.put(&mut writer);
        writer.opaque(&opaque);
        writer.array(&array);
        Some(hyper).put(&mut writer);
        prop_assert_eq!(writer.len_bytes() % 4, 0);
        let mut reader = Reader::new(writer.bytes());
        prop_assert_eq!(reader.u32(), Ok(number));
        prop_assert_eq!(reader.u64(), Ok(hyper));
        prop_assert_eq!(reader.boolean(), Ok(flag));
        prop_assert_eq!(reader.fixed(), Ok(fixed));
        prop_assert_eq!(reader.opaque(opaque.len()), Ok(opaque.as_slice()));
        prop_assert_eq!(reader.array(array.len()), Ok(array));
        prop_assert_eq!(reader.optional(), Ok(Some(hyper)));
        prop_assert_eq!(reader.end(), Ok(()));
        prop_assert_eq!(reader.read_bytes(), writer.len_bytes());
    }

    #[test]
    fn no_bytes_are_too_strange_to_be_read(bytes: Vec<u8>, len_max in 0_usize..64) {
        let reader = Reader::new(&bytes);
        let _ = reader.clone().opaque(len_max);
        let _ = reader.clone().array::<u64>(len_max);
        let _ = reader.clone().optional::<[u8; 7]>();
    }
}

/// RFC 4506, 7: the file `sillyprog` of `john` with the contents `(quit)`.
#[test]
fn the_example_of_the_standard_is_written_as_it_stands_there() {
    let mut writer = Writer::default();
    writer.opaque(b"sillyprog");
    writer.u32(2);
    writer.opaque(b"lisp");
    writer.opaque(b"john");
    writer.opaque(b"(quit)");
    let expected = [
        &[0, 0, 0, 9][..],
        b"sillyprog\0\0\0",
        &[0, 0, 0, 2, 0, 0, 0, 4],
        b"lisp",
        &[0, 0, 0, 4],
        b"john",
        &[0, 0, 0, 6],
        b"(quit)\0\0",
    ];
    assert_eq!(writer.into_bytes(), expected.concat());
}

#[test]
fn what_may_not_be_so_long_is_refused_before_it_is_there() {
    let long = |len, len_max| Err(XdrError::Long { len, len_max });
    assert_eq!(Reader::new(&[0xff; 4]).opaque(400), long(u32::MAX, 400));
    assert_eq!(
        Reader::new(&[0, 0, 0, 5]).array::<u32>(4).map(drop),
        long(5, 4).map(drop)
    );
    assert_eq!(Reader::new(&[0, 0, 0, 5]).opaque(5), Err(XdrError::Short));
}

#[test]
fn room_is_filled_where_it_was_left() {
    let mut writer = Writer::behind(vec![1, 2, 3]);
    let reserved = writer.reserve();
    writer.u64(9);
    assert_eq!(writer.bytes_behind(&reserved), 8);
    writer.fill(reserved, 0x0405_0607);
    assert_eq!(writer.into_bytes(), [1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 9]);
}

#[test]
fn a_boolean_is_one_of_two() {
    let value = XdrError::Value {
        field: "boolean",
        value: 2,
    };
    assert_eq!(Reader::new(&[0, 0, 0, 2]).boolean(), Err(value));
    assert_eq!(Reader::new(&[0, 0, 0, 2, 5]).end(), Err(XdrError::Trailing(5)));
}
