//! What is changed in the CPU that the guest sees: Firecracker's custom CPU templates, in which
//! whole CPUID leaves may be dropped too.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The body of `PUT /cpu-config`: a custom CPU template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// KVM capabilities that the host must have (`"69"`), or need not have (`"!69"`).
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Bits of CPUID leaves that are set or cleared.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Bits of model-specific registers that are set or cleared.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
    /// Leaves that the guest does not see at all, with all their subleaves. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpuid_drop: Vec<Hex>,
}

/// A KVM capability that is looked for at start, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// Looked for in addition to what is needed anyway.
    Require(u32),
    /// Not looked for.
    Waive(u32),
}

/// What is changed in one subleaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// Leaf, which the guest puts in EAX.
    pub leaf: Hex,
    /// Subleaf, which the guest puts in ECX.
    pub subleaf: Hex,
    /// `KVM_CPUID_FLAG_*` of the entry.
    pub flags: u32,
    /// What is changed in the registers of the answer.
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// What is changed in one register of a CPUID answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuidRegisterModifier {
    /// Which register.
    pub register: CpuidRegister,
    /// Which bits, and to what.
    pub bitmap: Bits<u32>,
}

/// A register of a CPUID answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// What is changed in one model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Index of the register.
    pub addr: Hex,
    /// Which bits, and to what.
    pub bitmap: Bits<u64>,
}

/// A number that JSON writes as a string, `"0x…"` or `"0b…"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hex(pub u32);

/// Bits of a register that are forced: written `"0b…"` with `0`, `1` and `x` for "as it is", most
/// significant first; bits to the left of the text are as they are; `_` separates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bits<T> {
    /// The bits that are forced.
    pub mask: T,
    /// What they are forced to; zero outside `mask`.
    pub value: T,
}

/// The two widths of register that [`Bits`] is for.
pub trait Register: Copy + Into<u64> + TryFrom<u64> {
    /// Name of the JSON schema.
    const SCHEMA: &'static str;
}

impl Register for u32 {
    const SCHEMA: &'static str = "Bits32";
}

impl Register for u64 {
    const SCHEMA: &'static str = "Bits64";
}

impl<T: Register> Bits<T> {
    fn parse(text: &str) -> Result<Self, String> {
        let (mut mask, mut value) = (0_u64, 0_u64);
        let mut bit = 0_usize;
        for character in text.strip_prefix("0b").unwrap_or(text).chars().rev() {
            if character == '_' {
                continue;
            }
            if bit == size_of::<T>() * 8 {
                return Err(format!(
                    "bitmap `{text}` is longer than the {bit} bits of the register"
                ));
            }
            match character {
                'x' => {}
                '0' => mask |= 1 << bit,
                '1' => (mask, value) = (mask | 1 << bit, value | 1 << bit),
                other => {
                    return Err(format!(
                        "bitmap `{text}` has the character `{other}`; use 0, 1, x and _"
                    ));
                }
            }
            bit += 1;
        }
        let narrow = |bits| {
            T::try_from(bits)
                .ok()
                .expect("no bit beyond the width of T was set")
        };
        Ok(Self {
            mask: narrow(mask),
            value: narrow(value),
        })
    }

    fn text(self) -> String {
        let (mask, value): (u64, u64) = (self.mask.into(), self.value.into());
        let digit = |bit: usize| match (mask >> bit & 1, value >> bit & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        "0b".chars()
            .chain((0..size_of::<T>() * 8).rev().map(digit))
            .collect()
    }
}

impl<T: Register> Serialize for Bits<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text())
    }
}

impl<'de, T: Register> Deserialize<'de> for Bits<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl<T: Register> JsonSchema for Bits<T> {
    fn schema_name() -> Cow<'static, str> {
        T::SCHEMA.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(0b)?[01x_]*$",
            "description": "Bits that are forced to 0 or 1, or left as they are (x); most significant first."
        })
    }
}

impl Hex {
    fn parse(text: &str) -> Result<Self, String> {
        let number = if let Some(digits) = text.strip_prefix("0x") {
            u32::from_str_radix(digits, 16)
        } else if let Some(digits) = text.strip_prefix("0b") {
            u32::from_str_radix(digits, 2)
        } else {
            return Err(format!(
                "number `{text}` has no prefix; write it with `0x` (hexadecimal) or `0b` (binary)"
            ));
        };
        number
            .map(Self)
            .map_err(|_| format!("`{text}` is not a number of 32 bits"))
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl JsonSchema for Hex {
    fn schema_name() -> Cow<'static, str> {
        "Hex".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(0x[0-9a-fA-F]+|0b[01]+)$",
            "description": "A number of 32 bits, hexadecimal or binary."
        })
    }
}

impl KvmCapability {
    fn parse(text: &str) -> Result<Self, String> {
        let parse = |digits: &str| {
            digits.parse().map_err(|_| {
                format!("`{text}` is not a KVM capability; write its number, as in \"69\" or \"!69\"")
            })
        };
        match text.strip_prefix('!') {
            Some(digits) => parse(digits).map(Self::Waive),
            None => parse(text).map(Self::Require),
        }
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Require(number) => serializer.serialize_str(&number.to_string()),
            Self::Waive(number) => serializer.serialize_str(&format!("!{number}")),
        }
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl JsonSchema for KvmCapability {
    fn schema_name() -> Cow<'static, str> {
        "KvmCapability".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^!?[0-9]+$",
            "description": "Number of a KVM capability that the host must have; with `!`, that it need not have."
        })
    }
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "a test's panic is its failure"
    )]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_template_becomes_masks_and_values() {
        let config: CpuConfig = serde_json::from_str(
            r#"{"kvm_capabilities": ["69", "!70"],
                "cpuid_modifiers": [{"leaf": "0x80000001", "subleaf": "0b11", "flags": 1, "modifiers":
                    [{"register": "ecx", "bitmap": "0bx0_1"}]}],
                "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1xxx"}],
                "cpuid_drop": ["0x7", "0xd"]}"#,
        )
        .unwrap();

        assert_eq!(
            config.kvm_capabilities,
            [KvmCapability::Require(69), KvmCapability::Waive(70)]
        );
        let leaf = &config.cpuid_modifiers[0];
        assert_eq!(
            (leaf.leaf, leaf.subleaf, leaf.flags),
            (Hex(0x8000_0001), Hex(3), 1)
        );
        assert_eq!(leaf.modifiers[0].register, CpuidRegister::Ecx);
        assert_eq!(
            leaf.modifiers[0].bitmap,
            Bits {
                mask: 0b11,
                value: 0b01
            }
        );
        assert_eq!(config.msr_modifiers[0].bitmap, Bits { mask: 8, value: 8 });
        assert_eq!(config.cpuid_drop, [Hex(7), Hex(0xd)]);
    }

    #[test]
    fn a_template_that_is_wrong_is_refused_with_the_reason() {
        let refused = |json: &str, reason: &str| {
            let error = serde_json::from_str::<CpuConfig>(json).unwrap_err().to_string();
            assert!(error.contains(reason), "{json}: {error}");
        };
        refused(r#"{"cpuid_drop": ["7"]}"#, "has no prefix");
        refused(r#"{"cpuid_drop": [7]}"#, "invalid type");
        refused(r#"{"cpuid_drop": ["0x100000000"]}"#, "not a number of 32 bits");
        refused(r#"{"kvm_capabilities": ["x"]}"#, "not a KVM capability");
        refused(
            r#"{"msr_modifiers": [{"addr": "0x1", "bitmap": "0b2"}]}"#,
            "has the character `2`",
        );
        let long = format!(
            r#"{{"msr_modifiers": [{{"addr": "0x1", "bitmap": "0b{}"}}]}}"#,
            "x".repeat(65)
        );
        refused(&long, "longer than the 64 bits");
        refused(
            r#"{"msr_modifiers": [{"addr": "0x1", "bitmap": "0b1", "size": 1}]}"#,
            "unknown field `size`",
        );
        refused(r#"{"reg_modifiers": []}"#, "unknown field `reg_modifiers`");
        refused(
            r#"{"cpuid_drop": [], "cpuid_drop": []}"#,
            "duplicate field `cpuid_drop`",
        );
    }

    proptest! {
        #[test]
        fn bits_survive_being_written_and_read(mask: u64, value: u64) {
            let bits = Bits { mask, value: value & mask };
            prop_assert_eq!(Bits::parse(&bits.text()), Ok(bits));
        }

        #[test]
        fn no_text_makes_a_template_panic(text in ".{0,80}") {
            let (_, _, _) = (Bits::<u32>::parse(&text), Hex::parse(&text), KvmCapability::parse(&text));
        }
    }
}
