#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use proptest::prelude::*;

use super::*;

const OPCODES: &[u8] = &[
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x31, 0x32, 0x3f,
];

fn any_bhs() -> impl Strategy<Value = Bhs> {
    // Half of them with an operation that there is.
    let opcode = prop_oneof![prop::sample::select(OPCODES), any::<u8>()];
    (opcode, any::<[[u8; 16]; 3]>()).prop_map(|(opcode, bytes)| {
        let mut bhs: [u8; 48] = bytes.concat().try_into().unwrap();
        bhs[0] = opcode;
        Bhs(bhs)
    })
}

fn bhs(text: &str) -> Bhs {
    let digits: String = text.split_whitespace().collect();
    let bytes: Vec<u8> = (0..BHS_BYTES)
        .map(|at| u8::from_str_radix(digits.get(2 * at..2 * at + 2).unwrap(), 16).unwrap())
        .collect();
    Bhs(bytes.try_into().unwrap())
}

proptest! {
    #[test]
    fn what_a_target_says_is_written_as_it_was_read(bhs in any_bhs()) {
        if let Ok(pdu) = TargetPdu::parse(&bhs) {
            prop_assert_eq!(TargetPdu::parse(&pdu.bhs()), Ok(pdu));
            prop_assert_eq!(pdu.bhs().opcode(), bhs.opcode());
            prop_assert!(InitiatorPdu::parse(&bhs).is_err());
        }
    }

    #[test]
    fn what_an_initiator_says_is_written_as_it_was_read(bhs in any_bhs()) {
        if let Ok(pdu) = InitiatorPdu::parse(&bhs) {
            prop_assert_eq!(InitiatorPdu::parse(&pdu.bhs()), Ok(pdu));
            prop_assert_eq!(pdu.bhs().opcode(), bhs.opcode());
            prop_assert!(TargetPdu::parse(&bhs).is_err());
        }
    }

    #[test]
    fn a_data_segment_changes_nothing_else(bhs in any_bhs(), data_bytes in 0..=DATA_SEGMENT_BYTES_MAX) {
        let with = bhs.with_data_segment(data_bytes);
        prop_assert_eq!(with.data_segment_bytes(), data_bytes);
        prop_assert_eq!(with.ahs_bytes(), bhs.ahs_bytes());
        prop_assert_eq!(InitiatorPdu::parse(&with), InitiatorPdu::parse(&bhs));
        prop_assert_eq!(TargetPdu::parse(&with), TargetPdu::parse(&bhs));
        prop_assert_eq!(with.with_data_segment(bhs.data_segment_bytes()), bhs);
    }

    #[test]
    fn a_logical_unit_is_read_as_it_was_written(number in 0..=Lun::NUMBER_MAX) {
        let lun = Lun::new(number).unwrap();
        prop_assert_eq!(lun.number(), Some(number));
        prop_assert_eq!(Lun::of_wire(lun.wire()), lun);
    }
}

/// The diagrams of the sections, with a different value in each field.
#[test]
#[expect(clippy::too_many_lines, reason = "a table: a row is a PDU and its bytes")]
fn each_field_of_an_initiator_is_where_its_section_puts_it() {
    let (lun, tag) = (Lun::new(0x123).unwrap(), Tag(0x1617_1819));
    let (cmd_sn, exp_stat_sn) = (Serial(0x2425_2627), Serial(0x2829_2a2b));
    let command = ScsiCommand {
        immediate: true,
        is_final: true,
        read: false,
        write: true,
        attribute: TaskAttribute::HeadOfQueue,
        lun,
        initiator_task_tag: tag,
        expected_data_transfer_length: 0x2021_2223,
        cmd_sn,
        exp_stat_sn,
        cdb: *b"0123456789abcdef",
    };
    let wire = "41a30000 00000005 41230000 00000000 16171819 20212223 24252627 28292a2b
                30313233 34353637 38396162 63646566";
    assert_eq!(command.bhs().with_data_segment(5), bhs(wire));
    let login = LoginRequest {
        transit: Transit::Leave(Stage::LoginOperationalNegotiation, Stage::FullFeaturePhase),
        version_max: 2,
        version_min: 3,
        isid: Isid([8, 9, 10, 11, 12, 13]),
        tsih: 0x0e0f,
        initiator_task_tag: tag,
        cid: 0x2021,
        cmd_sn,
        exp_stat_sn,
    };
    let wire = "43870203 00000000 08090a0b 0c0d0e0f 16171819 20210000 24252627 28292a2b
                00000000 00000000 00000000 00000000";
    assert_eq!(login.bhs(), bhs(wire));
    let data = DataOut {
        is_final: true,
        lun,
        initiator_task_tag: tag,
        target_transfer_tag: Tag(0x2021_2223),
        exp_stat_sn,
        data_sn: 0x3637_3839,
        buffer_offset: 0x4041_4243,
    };
    let wire = "05800000 00000000 41230000 00000000 16171819 20212223 00000000 28292a2b
                00000000 36373839 40414243 00000000";
    assert_eq!(data.bhs(), bhs(wire));
    let abort = TaskManagementRequest {
        immediate: true,
        function: TaskFunction::ABORT_TASK,
        lun,
        initiator_task_tag: tag,
        referenced_task_tag: Tag(0x2021_2223),
        cmd_sn,
        exp_stat_sn,
        ref_cmd_sn: Serial(0x3233_3435),
        exp_data_sn: 0x3637_3839,
    };
    let wire = "42810000 00000000 41230000 00000000 16171819 20212223 24252627 28292a2b
                32333435 36373839 00000000 00000000";
    assert_eq!(abort.bhs(), bhs(wire));
    let logout = LogoutRequest {
        immediate: false,
        reason: LogoutReason::CLOSE_CONNECTION,
        initiator_task_tag: tag,
        cid: 0x2021,
        cmd_sn,
        exp_stat_sn,
    };
    let wire = "06810000 00000000 00000000 00000000 16171819 20210000 24252627 28292a2b
                00000000 00000000 00000000 00000000";
    assert_eq!(logout.bhs(), bhs(wire));
    let nop = NopOut {
        immediate: true,
        lun,
        initiator_task_tag: Tag::RESERVED,
        target_transfer_tag: Tag(0x2021_2223),
        cmd_sn,
        exp_stat_sn,
    };
    let wire = "40800000 00000000 41230000 00000000 ffffffff 20212223 24252627 28292a2b
                00000000 00000000 00000000 00000000";
    assert_eq!(nop.bhs(), bhs(wire));
    let text = TextRequest {
        immediate: false,
        is_final: false,
        is_continued: true,
        lun,
        initiator_task_tag: tag,
        target_transfer_tag: Tag::RESERVED,
        cmd_sn,
        exp_stat_sn,
    };
    let wire = "04400000 00000000 41230000 00000000 16171819 ffffffff 24252627 28292a2b
                00000000 00000000 00000000 00000000";
    assert_eq!(text.bhs(), bhs(wire));
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table: a row is a PDU and its bytes")]
fn each_field_of_a_target_is_where_its_section_puts_it() {
    let numbers = "24252627 28292a2b 2c2d2e2f";
    let stat_sn = Serial(0x2425_2627);
    let window = Window {
        exp_cmd_sn: Serial(0x2829_2a2b),
        max_cmd_sn: Serial(0x2c2d_2e2f),
    };
    let (lun, tag, transfer) = (Lun::new(7).unwrap(), Tag(0x1617_1819), Tag(0x2021_2223));
    let response = ScsiResponse {
        response: ServiceResponse::TARGET_FAILURE,
        status: 2,
        residual: Residual::Underflow(0x4445_4647),
        initiator_task_tag: tag,
        stat_sn,
        window,
        exp_data_sn: 0x3637_3839,
    };
    let head = "00000000 00070000 00000000 16171819 20212223";
    let cases = [
        (
            TargetPdu::ScsiResponse(response),
            format!(
                "21820102 00000000 00000000 00000000 16171819 00000000 {numbers} 36373839 00000000 44454647"
            ),
        ),
        (
            TargetPdu::DataIn(DataIn {
                is_final: true,
                acknowledge: false,
                status: Some(DataInStatus {
                    status: 4,
                    stat_sn,
                    residual: Residual::Overflow(0x4445_4647),
                }),
                lun,
                initiator_task_tag: tag,
                target_transfer_tag: transfer,
                window,
                data_sn: 0x3637_3839,
                buffer_offset: 0x4041_4243,
            }),
            format!("25850004 {head} {numbers} 36373839 40414243 44454647"),
        ),
        (
            TargetPdu::R2t(R2t {
                lun,
                initiator_task_tag: tag,
                target_transfer_tag: transfer,
                stat_sn,
                window,
                r2t_sn: 0x3637_3839,
                buffer_offset: 0x4041_4243,
                desired_data_transfer_length: 0x4445_4647,
            }),
            format!("31800000 {head} {numbers} 36373839 40414243 44454647"),
        ),
        (
            TargetPdu::NopIn(NopIn {
                lun,
                initiator_task_tag: tag,
                target_transfer_tag: transfer,
                stat_sn,
                window,
            }),
            format!("20800000 {head} {numbers} 00000000 00000000 00000000"),
        ),
        (
            TargetPdu::LoginResponse(LoginResponse {
                transit: Transit::Leave(Stage::SecurityNegotiation, Stage::LoginOperationalNegotiation),
                version_max: 3,
                version_active: 2,
                isid: Isid([8, 9, 10, 11, 12, 13]),
                tsih: 0x0e0f,
                initiator_task_tag: tag,
                stat_sn,
                window,
                status_class: 2,
                status_detail: 5,
            }),
            format!(
                "23810302 00000000 08090a0b 0c0d0e0f 16171819 00000000 {numbers} 02050000 00000000 00000000"
            ),
        ),
        (
            TargetPdu::TextResponse(TextResponse {
                is_final: true,
                is_continued: false,
                lun,
                initiator_task_tag: tag,
                target_transfer_tag: transfer,
                stat_sn,
                window,
            }),
            format!("24800000 {head} {numbers} 00000000 00000000 00000000"),
        ),
        (
            TargetPdu::TaskManagementResponse(TaskManagementResponse {
                response: TaskOutcome::FUNCTION_NOT_SUPPORTED,
                initiator_task_tag: tag,
                stat_sn,
                window,
            }),
            format!(
                "22800500 00000000 00000000 00000000 16171819 00000000 {numbers} 00000000 00000000 00000000"
            ),
        ),
        (
            TargetPdu::LogoutResponse(LogoutResponse {
                response: LogoutOutcome::CLEANUP_FAILED,
                initiator_task_tag: tag,
                stat_sn,
                window,
                time2wait: 0x4041,
                time2retain: 0x4243,
            }),
            format!(
                "26800300 00000000 00000000 00000000 16171819 00000000 {numbers} 00000000 40414243 00000000"
            ),
        ),
        (
            TargetPdu::Async(Async {
                lun,
                stat_sn,
                window,
                async_event: AsyncEvent::CONNECTION_DROPPED,
                async_vcode: 7,
                parameter1: 0x3839,
                parameter2: 0x4041,
                parameter3: 0x4243,
            }),
            format!(
                "32800000 00000000 00070000 00000000 ffffffff 00000000 {numbers} 02073839 40414243 00000000"
            ),
        ),
        (
            TargetPdu::Reject(Reject {
                reason: RejectReason::PROTOCOL_ERROR,
                stat_sn,
                window,
                data_sn: 0x3637_3839,
            }),
            format!(
                "3f800400 00000000 00000000 00000000 ffffffff 00000000 {numbers} 36373839 00000000 00000000"
            ),
        ),
    ];
    for (pdu, wire) in cases {
        assert_eq!(pdu.bhs(), bhs(&wire), "{pdu:?}");
        assert_eq!(TargetPdu::parse(&pdu.bhs()), Ok(pdu));
        assert_eq!(pdu.window(), window);
        let expected = (!matches!(pdu, TargetPdu::R2t(_))).then_some(stat_sn);
        assert_eq!(pdu.status_number(), expected);
    }
}

#[test]
fn a_ping_does_not_use_its_status_number_up() {
    let ping = NopIn {
        lun: Lun::default(),
        initiator_task_tag: Tag::RESERVED,
        target_transfer_tag: Tag(1),
        stat_sn: Serial(9),
        window: Window::default(),
    };
    assert_eq!(TargetPdu::NopIn(ping).status_number(), None);
}

#[test]
fn values_that_the_standard_does_not_allow_are_refused() {
    let refused = |pdu: &Bhs, expected| {
        let error = match pdu.opcode() & 0x20 {
            0 => InitiatorPdu::parse(pdu).unwrap_err(),
            _ => TargetPdu::parse(pdu).unwrap_err(),
        };
        assert!(
            matches!(error, PduError::Field { field, .. } if field == expected),
            "{error}"
        );
    };
    refused(&Bhs::of(0x25).put::<1, 1>([0x01]), "S without F");
    refused(&Bhs::of(0x21).put::<1, 1>([0x86]), "O and U");
    refused(&Bhs::of(0x01).put::<1, 1>([0x85]), "ATTR");
    refused(&Bhs::of(0x23).put::<1, 1>([0x08]), "CSG");
    refused(&Bhs::of(0x23).put::<1, 1>([0x82]), "NSG");
    refused(&Bhs::of(0x23).put::<1, 1>([0x84]), "NSG");
    refused(&Bhs::of(0x03).put::<1, 1>([0xc0]), "T and C");
    assert_eq!(TargetPdu::parse(&Bhs::of(0x3e)), Err(PduError::Opcode(0x3e)));
    assert_eq!(InitiatorPdu::parse(&Bhs::of(0x10)), Err(PduError::Opcode(0x10)));
}

#[test]
fn a_refused_login_is_understood_whatever_stage_it_says() {
    let refusal = Bhs::of(0x23).put::<1, 1>([0xff]).put::<36, 2>([2, 3]);
    let Ok(TargetPdu::LoginResponse(login)) = TargetPdu::parse(&refusal) else {
        panic!("{refusal:?}");
    };
    assert_eq!((login.status_class, login.status_detail), (2, 3));
}

#[test]
fn a_logical_unit_with_another_way_of_addressing_has_no_number() {
    assert_eq!(Lun::new(255).unwrap().wire(), [0, 255, 0, 0, 0, 0, 0, 0]);
    assert_eq!(Lun::new(256).unwrap().wire(), [0x41, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(Lun::new(Lun::NUMBER_MAX + 1), None);
    for wire in [
        [1, 5, 0, 0, 0, 0, 0, 0],
        [0, 5, 0, 1, 0, 0, 0, 0],
        [0xc1, 1, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(Lun::of_wire(wire).number(), None, "{wire:?}");
    }
}

#[test]
fn padding_fills_words_of_four_bytes() {
    assert_eq!([0, 1, 2, 3, 4, 5].map(padding_bytes), [0, 3, 2, 1, 0, 3]);
    assert_eq!(Bhs::of(0).put::<4, 1>([255]).ahs_bytes(), 1020);
}
