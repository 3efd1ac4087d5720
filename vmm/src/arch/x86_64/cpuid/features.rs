//! Registers of CPUID whose bits are features, with the names that /proc/cpuinfo has for them (SDM volume 2A, CPUID;
//! APM volume 3, appendix E; KVM's `cpuid.rst` for leaf 0x40000001).

use super::Cpuid;
use crate::arch::x86_64::template::CpuidRegister::{self, Eax, Ebx, Ecx, Edx};

/// One register of one subleaf.
pub(super) struct FeatureWord {
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: CpuidRegister,
    /// Bits by which a host cannot lack anything: the monitor or KVM gives them on every host, or they follow from a
    /// control register, or they are no features.
    ignored: u32,
    /// From bit 0 on, `-` where there is no name.
    names: &'static str,
}

impl FeatureWord {
    /// The bits in which a guest that has `saved` finds something that `host` does not give.
    pub(super) fn lost(&self, saved: u32, host: &Cpuid) -> impl Iterator<Item = u8> {
        let host = host.answer(self.leaf, self.subleaf, self.register);
        let lost = saved & !host & self.compared();
        (0..32).filter(move |bit| lost >> bit & 1 != 0)
    }

    pub(super) fn compared(&self) -> u32 {
        !self.ignored
    }

    pub(super) fn name(&self, bit: u8) -> Option<&'static str> {
        let name = self.names.split_whitespace().nth(bit.into())?;
        (name != "-").then_some(name)
    }
}

/// All that is compared.
pub(super) const FEATURE_WORDS: [FeatureWord; 22] = [
    FeatureWord {
        leaf: 1,
        subleaf: 0,
        register: Ecx,
        // MONITOR and OSXSAVE follow from registers; the deadline timer and the hypervisor bit are given everywhere.
        ignored: 1 << 3 | 1 << 24 | 1 << 27 | 1 << 31,
        names: "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
                sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    },
    FeatureWord {
        leaf: 1,
        subleaf: 0,
        register: Edx,
        // APIC follows from a register; HTT says that there are several processors.
        ignored: 1 << 9 | 1 << 28,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr \
                sse sse2 ss ht tm ia64 pbe",
    },
    FeatureWord {
        leaf: 7,
        subleaf: 0,
        register: Ebx,
        // Both say that the FPU lacks something.
        ignored: 1 << 6 | 1 << 13,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq \
                rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    },
    FeatureWord {
        leaf: 7,
        subleaf: 0,
        register: Ecx,
        // OSPKE follows from a register; bits 17 to 21 are a number.
        ignored: 1 << 4 | 0x1f << 17,
        names: "- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg \
                tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc \
                pks",
    },
    FeatureWord {
        leaf: 7,
        subleaf: 0,
        register: Edx,
        ignored: 0,
        names: "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort \
                - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile \
                amx_int8 ibrs stibp flush_l1d arch_capabilities core_capabilities ssbd",
    },
    FeatureWord {
        leaf: 7,
        subleaf: 1,
        register: Eax,
        ignored: 0,
        names: "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred \
                lkgs wrmsrns - amx_fp16 hreset avx_ifma - - lam msrlist",
    },
    FeatureWord {
        leaf: 7,
        subleaf: 1,
        register: Edx,
        ignored: 0,
        names: "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - - avx10",
    },
    FeatureWord {
        leaf: 7,
        subleaf: 2,
        register: Edx,
        ignored: 0,
        names: "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    },
    FeatureWord {
        leaf: 0xd,
        subleaf: 0,
        register: Eax,
        ignored: 0,
        names: "x87_state sse_state avx_state bndregs_state bndcsr_state opmask_state zmm_hi256_state hi16_zmm_state - \
                pkru_state - - - - - - - xtilecfg_state xtiledata_state",
    },
    FeatureWord {
        leaf: 0xd,
        subleaf: 0,
        register: Edx,
        ignored: 0,
        names: "",
    },
    FeatureWord {
        leaf: 0xd,
        subleaf: 1,
        register: Eax,
        ignored: 0,
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
    },
    FeatureWord {
        leaf: 0xd,
        subleaf: 1,
        register: Ecx,
        ignored: 0,
        names: "- - - - - - - - pt_state - pasid_state cet_u_state cet_s_state hdc_state uintr_state lbr_state hwp_state",
    },
    FeatureWord {
        leaf: 0x14,
        subleaf: 0,
        register: Ebx,
        ignored: 0,
        names: "",
    },
    FeatureWord {
        leaf: 0x14,
        subleaf: 0,
        register: Ecx,
        ignored: 0,
        names: "",
    },
    FeatureWord {
        leaf: 0x4000_0001,
        subleaf: 0,
        register: Eax,
        ignored: 0,
        names: "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi \
                kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield \
                kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - \
                kvm_clocksource_stable",
    },
    FeatureWord {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Ecx,
        // The monitor gives both by the topology.
        ignored: 1 << 1 | 1 << 22,
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - \
                lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    },
    FeatureWord {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Edx,
        // APIC, as in leaf 1.
        ignored: 1 << 9,
        names: "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    },
    FeatureWord {
        leaf: 0x8000_0007,
        subleaf: 0,
        register: Edx,
        ignored: 0,
        names: "- - - - - - - - nonstop_tsc",
    },
    FeatureWord {
        leaf: 0x8000_0008,
        subleaf: 0,
        register: Ebx,
        ignored: 0,
        names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp - stibp_always_on - - - - - \
                amd_ppin ssbd virt_ssbd ssb_no cppc amd_psfd btc_no - brs",
    },
    FeatureWord {
        leaf: 0x8000_000a,
        subleaf: 0,
        register: Edx,
        ignored: 0,
        names: "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - pfthreshold \
                avic - v_vmsave_vmload vgif x2avic - - v_spec_ctrl - - - - vnmi",
    },
    FeatureWord {
        leaf: 0x8000_0021,
        subleaf: 0,
        register: Eax,
        ignored: 0,
        names: "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - - - - - - \
                - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no",
    },
    FeatureWord {
        leaf: 0x24,
        subleaf: 0,
        register: Ebx,
        // The version of AVX10, a number.
        ignored: 0xff,
        names: "",
    },
];
