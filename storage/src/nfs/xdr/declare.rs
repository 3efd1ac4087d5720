//! Declarations of types that stand on the wire as they are declared.

/// Declares a struct whose fields stand on the wire in their order (4.14).
macro_rules! xdr_struct {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$of_field:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        pub struct $name { $($(#[$of_field])* pub $field: $type,)* }

        impl $crate::nfs::xdr::Xdr for $name {
            fn put(&self, writer: &mut $crate::nfs::xdr::Writer) {
                $($crate::nfs::xdr::Xdr::put(&self.$field, writer);)*
            }

            fn read(
                reader: &mut $crate::nfs::xdr::Reader<'_>,
            ) -> Result<Self, $crate::nfs::xdr::XdrError> {
                Ok(Self { $($field: $crate::nfs::xdr::Xdr::read(reader)?,)* })
            }
        }
    };
}
pub(in crate::nfs) use xdr_struct;

/// Declares an enumeration (4.3), none of whose other values is allowed.
macro_rules! xdr_enum {
    (
        $(#[$meta:meta])*
        pub enum $name:ident($field:literal) { $($(#[$of_value:meta])* $value:ident = $number:literal,)* }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$of_value])* $value = $number,)* }

        impl $crate::nfs::xdr::Xdr for $name {
            fn put(&self, writer: &mut $crate::nfs::xdr::Writer) {
                writer.u32(*self as u32);
            }

            fn read(
                reader: &mut $crate::nfs::xdr::Reader<'_>,
            ) -> Result<Self, $crate::nfs::xdr::XdrError> {
                match reader.u32()? {
                    $($number => Ok(Self::$value),)*
                    value => Err($crate::nfs::xdr::XdrError::Value { field: $field, value }),
                }
            }
        }
    };
}
pub(in crate::nfs) use xdr_enum;

/// Declares a struct that stands on the wire as the one field that it has.
macro_rules! xdr_newtype {
    ($(#[$meta:meta])* pub struct $name:ident(pub $type:ty);) => {
        $(#[$meta])*
        pub struct $name(pub $type);

        impl $crate::nfs::xdr::Xdr for $name {
            fn put(&self, writer: &mut $crate::nfs::xdr::Writer) {
                $crate::nfs::xdr::Xdr::put(&self.0, writer);
            }

            fn read(
                reader: &mut $crate::nfs::xdr::Reader<'_>,
            ) -> Result<Self, $crate::nfs::xdr::XdrError> {
                Ok(Self($crate::nfs::xdr::Xdr::read(reader)?))
            }
        }
    };
}
pub(in crate::nfs) use xdr_newtype;
