# From the monitor to CPL 3 in some 50 instructions: hosts that emulate CPL 0 pay microseconds for each.
# AT&T syntax. Selectors: 0x08 code, CPL 0; 0x10 data, CPL 0; 0x18 32-bit code, CPL 0; 0x2b data, CPL 3;
# 0x33 code, CPL 3; 0x40 + 16 n, the task state of vCPU n.

# The PVH entry point, for the monitor: Xen's note 18 (XEN_ELFNOTE_PHYS32_ENTRY).
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start

    .section .boot.text, "ax"

# 32-bit protected mode, no paging, EBX = address of the start info.
    .code32
    .globl pvh_start
pvh_start:
    movl %ebx, start_info_address
enter_long_mode:
    lgdt gdt_pointer
    movl $0x620, %eax               # CR4: PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $page_map, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          # EFER: LME
    movl $0x100, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80000033, %eax          # CR0: PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmp $0x08, $1f

    .code64
1:  movl $1, %eax                   # XSAVE: what the CPU can save of SSE, AVX and AVX-512 may be used
    cpuid
    btl $26, %ecx
    jnc 3f
    movl $0x40620, %eax             # CR4: OSXSAVE beside the others
    movq %rax, %cr4
    movl $0xd, %eax
    xorl %ecx, %ecx
    cpuid
    movl %eax, %ecx
    andl $0xe7, %eax
    andl $0xe0, %ecx
    cmpl $0xe0, %ecx                # AVX-512 is all three of its parts, or none
    je 2f
    andl $7, %eax
2:  testb $1, %al
    jz 3f
    xorl %edx, %edx
    xorl %ecx, %ecx
    xsetbv
3:  lidt idt_pointer
    movw boot_task, %ax
    ltr %ax
    movb $0xff, %al                 # an unmasked PIC would deliver on the vectors of exceptions
    outb %al, $0x21
    outb %al, $0xa1
    movl $boot_frame, %esp
    iretq

# The services of CPL 0 for CPL 3, by int3. Idle: halts until an interrupt if the counter at RDI is still RAX. The gate
# has cleared IF, so an interrupt between the comparison and the hlt is not lost.
    .globl service_idle
service_idle:
    cmpq %rax, (%rdi)
    jne 1f
    sti
    hlt
1:  iretq

# Put in the place of service_idle by `fault:kind=emulation`.
    .globl service_unemulated
service_unemulated:
    popcntl %eax, %eax
    iretq

# Page faults come through CPL 0, which alone may read CR2; the rest of the panic runs at CPL 3 on the panic stack.
    .globl page_fault_entry
page_fault_entry:
    popq page_fault_frame + 8
    movq %cr2, %rax
    movq %rax, page_fault_address
    movq (%rsp), %rax
    movq %rax, page_fault_frame + 16
    movq $page_fault_native, (%rsp)
    movq $page_fault_stack_top, 24(%rsp)
    iretq
page_fault_native:
    movl $page_fault_frame, %edi
    call exception_entry

# The other exceptions run at CPL 3 on the stack that the task state names. 32 stubs of 16 bytes, which push the vector
# and, where the CPU pushes no error code, a zero in its place.
    .balign 16
    .globl exception_stubs
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if ((0x60227d00 >> vector) & 1) == 0
    pushq $0
    .endif
    pushq $vector
    jmp exception_common
    .set vector, vector + 1
    .endr
exception_common:
    movq %rsp, %rdi
    andq $-16, %rsp
    call exception_entry

# Interrupts only count, and acknowledge at the local APIC, which takes any value, so that no register is saved. What the
# device wants is asked at CPL 3. One stub of 32 bytes per counter.
    .balign 32
    .globl interrupt_stubs
interrupt_stubs:
    .set line, 0
    .rept 25
    .balign 32
    lock incq interrupt_counts + 8 * line
    movabsl %eax, 0xfee000b0
    iretq
    .set line, line + 1
    .endr
    .balign 32
    .globl spurious_stub
spurious_stub:
    iretq

# Where other vCPUs start: copied to a page below 1 MiB, CS = that page, 16-bit real mode.
    .globl trampoline_start
trampoline_start:
    .code16
    cli
    lgdtl %cs:trampoline_gdt_pointer - trampoline_start
    movl $0x33, %eax
    movl %eax, %cr0
    ljmpl $0x18, $1f
    .balign 8
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .globl trampoline_end
trampoline_end:
    .code32
1:  movw $0x10, %ax
    movw %ax, %ds
    jmp enter_long_mode
    .code64

# The low 4 GiB in pages of 2 MiB, all of CPL 3 and marked accessed and dirty; the last GiB uncached, as devices are
# there. What lies above 4 GiB is mapped on demand.
    .section .page_tables, "aw"
    .balign 4096
page_map:
    .quad page_directory_pointers + 0x67
    .fill 511, 8, 0
    .globl page_directory_pointers
page_directory_pointers:
    .quad page_directories + 0x0067
    .quad page_directories + 0x1067
    .quad page_directories + 0x2067
    .quad page_directories + 0x3067
    .fill 508, 8, 0
page_directories:
    .set address, 0
    .rept 1536
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr
    .rept 512
    .quad address + 0xff
    .set address, address + 0x200000
    .endr

    .data
    .balign 16
    .globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cf9b000000ffff
    .quad 0
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .quad 0
    .quad first_task_descriptor, 0
    .fill ({cpus_max} - 1) * 2, 8, 0
gdt_end:

# What the next vCPU to start takes: its task state's selector, and where iretq leads (RIP, CS, RFLAGS, RSP, SS).
    .globl boot_task
boot_task:
    .quad 0x40
    .globl boot_frame
boot_frame:
    .quad start, 0x33, 0x202, first_stack_top - 8, 0x2b

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt

    .globl start_info_address
start_info_address:
    .quad 0
    .globl page_fault_frame
page_fault_frame:
    .quad 14, 0, 0
    .globl page_fault_address
page_fault_address:
    .quad 0

# The first vCPU's stack, on which commands keep what they measure.
    .bss
    .balign 16
    .skip 262144
first_stack_top:
    .skip 16384
page_fault_stack_top:
    .text

    .bss
    .balign 8
    .globl interrupt_counts
interrupt_counts:
    .skip 25 * 8
