//! The choice of instruction set: one table of what there is, and the value that
//! proves one of them present.

use bitnet_core::Layout;

#[cfg(target_arch = "aarch64")]
use crate::neon::{Neon, NeonDotprod, NeonI8mm};
use crate::portable::Portable;
#[cfg(target_arch = "x86_64")]
use crate::{
    avx2::{Avx2, AvxVnni},
    avx512::{Avx512Vbmi, Avx512Vnni},
};

#[cfg(target_arch = "aarch64")]
pub(crate) use std::arch::is_aarch64_feature_detected as is_detected;
#[cfg(target_arch = "x86_64")]
pub(crate) use std::arch::is_x86_feature_detected as is_detected;

/// Defines the token of an instruction set from one row, so that what
/// is detected and what is compiled for cannot drift apart.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! isa_token {
    ($(#[$doc:meta])* $token:ident = $name:literal: [$($feature:tt),*]) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) struct $token(());

        impl $token {
            /// The name in `BITNET_ISA`.
            pub(crate) const NAME: &'static str = $name;

            /// The token, where the machine has every feature.
            pub(crate) fn new() -> Option<Self> {
                (true $(&& $crate::isa::is_detected!($feature))*).then_some(Self(()))
            }

            /// Runs `f` compiled with the features.
            #[inline(always)]
            fn enter<R>(self, f: impl FnOnce() -> R) -> R {
                $(#[target_feature(enable = $feature)])*
                fn run<R>(f: impl FnOnce() -> R) -> R {
                    f()
                }
                // SAFETY: `new` makes a value only where these very features were
                // detected.
                unsafe { run(f) }
            }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use isa_token;

/// Makes the enum of instruction sets and `dispatch!` from the table, whose rows
/// stand in the order of preference.
macro_rules! isa_table {
    ($d:tt; $($(#[$cfg:meta])* $token:ident,)*) => {
        /// An instruction set that this machine has.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Isa {
            $($(#[$cfg])* $token($token),)*
        }

        impl Isa {
            /// The names of all that this build knows.
            const NAMES: &'static [&'static str] = &[$($(#[$cfg])* $token::NAME,)*];

            fn all() -> impl Iterator<Item = Self> {
                [$($(#[$cfg])* $token::new().map(Self::$token),)*].into_iter().flatten()
            }

            fn name(self) -> &'static str {
                match self {
                    $($(#[$cfg])* Self::$token(_) => $token::NAME,)*
                }
            }

            fn byte_lookup(self) -> bool {
                match self {
                    $($(#[$cfg])* Self::$token(_) => <$token as $crate::simd::Simd>::BYTE_LOOKUP,)*
                }
            }
        }

        /// Evaluates an expression compiled for the instruction set of a
        /// [`Kernels`] value; `isa` names its token. The one place where the
        /// instruction set of a call is decided.
        macro_rules! dispatch {
            ($d kernels:expr, $d isa:ident => $d body:expr) => {
                match $d kernels.isa {
                    $($(#[$cfg])* $crate::isa::Isa::$token($d isa) => {
                        $crate::simd::Simd::vectorize($d isa, #[inline(always)] || $d body)
                    })*
                }
            };
        }
        pub(crate) use dispatch;
    };
}

isa_table! { $;
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
    #[cfg(target_arch = "aarch64")]
    NeonDotprod,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

/// An instruction set that cannot be used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// No such name.
    #[error("unknown instruction set `{name}`; known: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The machine lacks it.
    #[error("instruction set `{name}` is not available on this machine; available: {available}")]
    Missing {
        /// The name asked for.
        name: String,
        /// What this machine has.
        available: String,
    },
}

/// The kernels of one instruction set that this machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernels {
    pub(crate) isa: Isa,
}

impl Kernels {
    /// The fastest instruction set of this machine.
    #[must_use]
    pub fn detect() -> Self {
        Self { isa: Isa::all().next().unwrap_or(Isa::Portable(Portable)) }
    }

    /// Every instruction set of this machine, the fastest first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        Isa::all().map(|isa| Self { isa }).collect()
    }

    /// The instruction set of that name.
    ///
    /// # Errors
    /// An unknown name, or a set that this machine lacks.
    pub fn by_name(name: &str) -> Result<Self, IsaError> {
        if let Some(isa) = Isa::all().find(|isa| isa.name() == name) {
            return Ok(Self { isa });
        }
        let name = name.to_owned();
        if Isa::NAMES.contains(&name.as_str()) {
            let available: Vec<_> = Isa::all().map(Isa::name).collect();
            return Err(IsaError::Missing { name, available: available.join(", ") });
        }
        Err(IsaError::Unknown { name, known: Isa::NAMES.join(", ") })
    }

    /// The set named in the environment variable `BITNET_ISA`, else [`Kernels::detect`].
    ///
    /// # Errors
    /// See [`Kernels::by_name`].
    pub fn from_env() -> Result<Self, IsaError> {
        match std::env::var("BITNET_ISA") {
            Ok(name) if !name.is_empty() => Self::by_name(&name),
            _ => Ok(Self::detect()),
        }
    }

    /// Whether products read rows of this layout as fast as they come. Otherwise
    /// (P5 on a set that cannot look bytes up) [`crate::repack_row`] is worth its
    /// memory; the sums are the same either way.
    #[must_use]
    pub fn reads_well(self, layout: Layout) -> bool {
        layout == Layout::P2 || self.isa.byte_lookup()
    }

    /// The name, as in `BITNET_ISA` and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.isa.name()
    }
}

/// The names in a comma-separated list (`BITNET_REQUIRE_ISA`) that this machine
/// lacks or that do not exist. A test run that asks for a path fails on them
/// instead of silently testing less.
#[must_use]
pub fn required_isas_missing(list: &str) -> Vec<String> {
    let names = list.split(',').map(str::trim).filter(|name| !name.is_empty());
    names.filter(|name| Kernels::by_name(name).is_err()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_set() {
        let all = Kernels::all();
        assert_eq!(all[0], Kernels::detect());
        assert_eq!(all[all.len() - 1].name(), "portable");
        for kernels in all {
            assert_eq!(Kernels::by_name(kernels.name()), Ok(kernels));
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = Kernels::by_name("mmx").unwrap_err().to_string();
        assert!(error.contains("`mmx`") && error.contains("portable"), "{error}");
    }

    #[test]
    fn required_sets_that_are_missing_are_named() {
        assert!(required_isas_missing("").is_empty());
        assert!(required_isas_missing("portable").is_empty());
        assert_eq!(required_isas_missing("portable, mmx,3dnow"), ["mmx", "3dnow"]);
    }
}
