# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_drive_backup_global_optspecs
    string join \n device= source-format= secret= no-backing dry-run allow-inconsistent target= format= target-secret= mode= cluster-size= compress= sparse= verify manifest= no-fsync speed= finish-by= speed-schedule= timeout= workers= direct writer= writer-dir= snapshot= overlay= overlay-limit= freeze-timeout= cbw-timeout= on-cbw-error= reconnect-delay= hook-before= hook-after= hook-failed= hook-timeout= hook-frozen= on-source-error= on-target-error= json progress= progress-interval= q/quiet v/verbose status-file= metrics-file= qmp= h/help V/version
end

function __fish_drive_backup_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_drive_backup_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_drive_backup_using_subcommand
    set -l cmd (__fish_drive_backup_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c drive-backup -n "__fish_drive_backup_needs_command" -l device -d 'The disk image or block device to copy; give it again, with a --target each, for several disks at one instant' -r -F
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l source-format -d 'Its format; by default its content tells' -r -f -a "raw\t'The disk\'s bytes and nothing else'
qcow2\t'QEMU\'s image format, versions 2 and 3; written as 3'
vmdk\t'VMware\'s; this and all below by qemu-nbd'
vdi\t'VirtualBox\'s'
vhdx\t'Hyper-V\'s'
vpc\t'Virtual PC\'s, VHD'
qed\t'QEMU\'s former enhanced disk'
parallels\t'Parallels\''
luks\t'An encrypted raw disk; needs --secret'
qcow2-luks\t'An encrypted qcow2; needs --secret'
dmg\t'Apple\'s; only as a source'
cloop\t'A compressed loop device; only as a source'
bochs\t'Bochs\'; only as a source'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l secret -d 'Where the secret is that opens an encrypted source: file:PATH, fd:N or env:NAME' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l target -d 'The file or block device to write, or - for a raw stream to standard output' -r -F
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l format -d 'The target\'s format' -r -f -a "raw\t'The disk\'s bytes and nothing else'
qcow2\t'QEMU\'s image format, versions 2 and 3; written as 3'
vmdk\t'VMware\'s; this and all below by qemu-nbd'
vdi\t'VirtualBox\'s'
vhdx\t'Hyper-V\'s'
vpc\t'Virtual PC\'s, VHD'
qed\t'QEMU\'s former enhanced disk'
parallels\t'Parallels\''
luks\t'An encrypted raw disk; needs --secret'
qcow2-luks\t'An encrypted qcow2; needs --secret'
dmg\t'Apple\'s; only as a source'
cloop\t'A compressed loop device; only as a source'
bochs\t'Bochs\'; only as a source'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l target-secret -d 'Where the secret is that shall open an encrypted target (luks, qcow2-luks, else refused); by default that of --secret' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l mode -d 'A new image, or one that is there' -r -f -a "absolute-paths\t'Make a new image beside the target and put it in the target\'s place when it is complete; a device is written in place'
existing\t'Write into the image that is there, in place'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l cluster-size -d 'Cluster size of a new qcow2: a power of two from 512 to 2M; 64K by default' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l compress -d 'Compress a new qcow2: zlib or zstd; with a level, 1 to 9 (3 by default) or 1 to 22 (1), as in zstd:9' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l sparse -d 'Turn runs of zero bytes into holes' -r -f -a "auto\t'Wherever the target can have holes'
never\t'Write every byte'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l manifest -d 'Write a manifest of the copy: its instant, and hashes by which drive-backup-verify(1) can check it at any time' -r -F
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l speed -d 'Limit in bytes a second, such as 50M; 0, off and unlimited mean none; auto backs off while writers wait longer' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l finish-by -d 'As slow as still arrives in time; when the time is over and the copy is not complete, exit status 10' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l speed-schedule -d 'Speeds by the time of day, as in \'08:00=10M 20:00=off\'' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l timeout -d 'Give up when the backup has taken so long: seconds, or with a unit, as in 90m or 8h; exit status 10' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l workers -d 'Number of copying threads; by default one for each core' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l writer -d 'Whether a cooperating writer takes part' -r -f -a "auto\t'If there is one'
required\t'Without one the backup does not start'
none\t'Nobody is looked for'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l writer-dir -d 'Where writers and backups find each other' -r -f -a "(__fish_complete_directories)"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l snapshot -d 'What keeps the instant' -r -f -a "auto\t'A clone where the file system can, else the overlay'
overlay\t'The overlay: what writers are about to overwrite is saved first'
reflink\t'A clone of the file system, or the backup does not start'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l overlay -d 'Folder for what writers are about to overwrite, or memory; by default TMPDIR, else /var/tmp' -r -f -a "(__fish_complete_directories)"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l overlay-limit -d 'The most that the overlay may hold; 0, off and unlimited mean no limit' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l freeze-timeout -d 'In how many seconds all writers must be frozen; 60 at most' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l cbw-timeout -d 'In how many seconds the old contents must be saved for a waiting write; 298 at most' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l on-cbw-error -d 'What happens when they can\'t be' -r -f -a "break-snapshot\t'The write goes on, the backup fails: exit status 6'
break-guest-write\t'The write fails, the backup goes on'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l reconnect-delay -d 'In how many seconds a lost NBD server must be back' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l hook-before -d 'A shell command that runs before a disk is opened; exit status 9 if it fails' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l hook-after -d 'One that runs when the copy is complete and both ends are closed; if it fails the copy stays, and the exit status is 9' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l hook-failed -d 'One that runs when there is no copy, both ends closed' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l hook-timeout -d 'In which time each of these must end' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l hook-frozen -d 'A shell command that runs while the writers are frozen, in what is left of --freeze-timeout' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l on-source-error -d 'What a read error of the source does' -r -f -a "report\t'End with the error'
ignore\t'Go on: an unreadable source range becomes zeroes, an unwritable target range is skipped; exit status 3'
enospc\t'Stop when the target is full, else report'
stop\t'Pause, and try again after Enter on the terminal or SIGCONT'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l on-target-error -d 'What a write error of the target does' -r -f -a "report\t'End with the error'
ignore\t'Go on: an unreadable source range becomes zeroes, an unwritable target range is skipped; exit status 3'
enospc\t'Stop when the target is full, else report'
stop\t'Pause, and try again after Enter on the terminal or SIGCONT'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l progress -d 'How progress is shown on standard error' -r -f -a "auto\t'A bar on a terminal, plain lines under systemd\'s journal, else none'
bar\t'A bar; plain lines where standard error is no terminal'
plain\t'A line every 30 seconds and one at the end'
none\t'None'"
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l progress-interval -d 'Time between JSON status records (1 by default) and between plain lines (30 by default)' -r
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l status-file -d 'Keep the newest JSON record in a file, replaced as a whole; of several disks, a line for each' -r -F
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l metrics-file -d 'When the run ends, however it does, write how it went for Prometheus\'s node_exporter (FILE.prom in its folder)' -r -F
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l qmp -d 'Let QMP clients, such as qmp-shell, watch and steer the run at this socket; see docs/QMP.md' -r -F
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l no-backing -d 'Refuse a source that has a backing file'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l dry-run -d 'Open, lock and check everything, say what the backup would take, and stop before its first byte'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l allow-inconsistent -d 'Accept a source that changes while it is copied; the copy may then be torn, and the summary says so'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l verify -d 'Read the target back from its medium after the flush, and compare it with what was written'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l no-fsync -d 'Do not flush the target; a success then promises nothing about a power cut'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l direct -d 'Bypass the page cache'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -l json -d 'Write JSON lines to standard output; to standard error where the copy goes to standard output'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -s q -l quiet -d 'Only errors: no progress, no warnings'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -s v -l verbose -d 'Also say what was found and done, on success too'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -s V -l version -d 'Print version'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -f -a "serve" -d 'Serve a disk to programs that know nothing of backups, so that it can be backed up while they write'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -f -a "verify" -d 'Check that an image holds what a manifest says'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -f -a "restore" -d 'Write an image back to a block device, or to a file'
complete -c drive-backup -n "__fish_drive_backup_needs_command" -f -a "ctl" -d 'Watch and steer backups that run'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l device -d 'The disk image or block device to serve; give it again for more disks' -r -F
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l format -d 'The format of the disks; by default their content tells' -r -f -a "raw\t'The disk\'s bytes and nothing else'
qcow2\t'QEMU\'s image format, versions 2 and 3; written as 3'
vmdk\t'VMware\'s; this and all below by qemu-nbd'
vdi\t'VirtualBox\'s'
vhdx\t'Hyper-V\'s'
vpc\t'Virtual PC\'s, VHD'
qed\t'QEMU\'s former enhanced disk'
parallels\t'Parallels\''
luks\t'An encrypted raw disk; needs --secret'
qcow2-luks\t'An encrypted qcow2; needs --secret'
dmg\t'Apple\'s; only as a source'
cloop\t'A compressed loop device; only as a source'
bochs\t'Bochs\'; only as a source'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l secret -d 'Where the secret is that opens encrypted disks, which can only be read: file:PATH, fd:N or env:NAME' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l writer-dir -d 'Where backups find this server' -r -f -a "(__fish_complete_directories)"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l nbd -d 'Serve NBD at unix:PATH or HOST:PORT; without a HOST on the loopback only. May be given again' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l tls-dir -d 'Require TLS of NBD clients, with server-cert.pem and server-key.pem from this folder' -r -f -a "(__fish_complete_directories)"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l max-connections -d 'The most NBD clients at once' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l vhost-user -d 'Serve a virtual machine as vhost-user-blk at this socket; give it once for each disk to be served so' -r -F
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l fuse -d 'Show a disk as a file: mounted over PATH, a regular file, which may be the image itself' -r -F
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l qmp -d 'Let QMP clients, such as qmp-shell, start and steer backups of the disks at this socket; see docs/QMP.md' -r -F
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l read-only -d 'Refuse every change; others may read the disks too'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -l json -d 'Write JSON lines to standard output: when it is ready, what goes wrong, how it ended'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -s q -l quiet -d 'Only errors'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l manifest -d 'What it should hold' -r -F
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l source-format -d 'The image\'s format; by default its content tells' -r -f -a "raw\t'The disk\'s bytes and nothing else'
qcow2\t'QEMU\'s image format, versions 2 and 3; written as 3'
vmdk\t'VMware\'s; this and all below by qemu-nbd'
vdi\t'VirtualBox\'s'
vhdx\t'Hyper-V\'s'
vpc\t'Virtual PC\'s, VHD'
qed\t'QEMU\'s former enhanced disk'
parallels\t'Parallels\''
luks\t'An encrypted raw disk; needs --secret'
qcow2-luks\t'An encrypted qcow2; needs --secret'
dmg\t'Apple\'s; only as a source'
cloop\t'A compressed loop device; only as a source'
bochs\t'Bochs\'; only as a source'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l secret -d 'Where the secret is that opens an encrypted image: file:PATH, fd:N or env:NAME' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l speed -d 'Limit in bytes a second, such as 50M; holes are not charged' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l workers -d 'Number of reading threads; by default one for each core' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l progress -d 'How progress is shown on standard error' -r -f -a "auto\t'A bar on a terminal, plain lines under systemd\'s journal, else none'
bar\t'A bar; plain lines where standard error is no terminal'
plain\t'A line every 30 seconds and one at the end'
none\t'None'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l progress-interval -d 'Time between JSON status records (1 by default) and between plain lines (30 by default)' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l direct -d 'Bypass the page cache: what the medium holds counts'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -l json -d 'Write JSON lines to standard output; to standard error where the copy goes to standard output'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -s q -l quiet -d 'Only errors: no progress, no warnings'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -s v -l verbose -d 'Also say what was found and done, on success too'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand verify" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l target -d 'The block device or file to write' -r -F
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l manifest -d 'What the image should hold, as a backup with --manifest wrote it' -r -F
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l source-format -d 'The image\'s format; by default its content tells' -r -f -a "raw\t'The disk\'s bytes and nothing else'
qcow2\t'QEMU\'s image format, versions 2 and 3; written as 3'
vmdk\t'VMware\'s; this and all below by qemu-nbd'
vdi\t'VirtualBox\'s'
vhdx\t'Hyper-V\'s'
vpc\t'Virtual PC\'s, VHD'
qed\t'QEMU\'s former enhanced disk'
parallels\t'Parallels\''
luks\t'An encrypted raw disk; needs --secret'
qcow2-luks\t'An encrypted qcow2; needs --secret'
dmg\t'Apple\'s; only as a source'
cloop\t'A compressed loop device; only as a source'
bochs\t'Bochs\'; only as a source'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l secret -d 'Where the secret is that opens an encrypted image: file:PATH, fd:N or env:NAME' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l target-secret -d 'Where the secret is that shall open an encrypted target (luks, qcow2-luks, else refused); by default that of --secret' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l format -d 'The target\'s format; by default raw, but what --mode existing finds, or what a new file\'s extension says' -r -f -a "raw\t'The disk\'s bytes and nothing else'
qcow2\t'QEMU\'s image format, versions 2 and 3; written as 3'
vmdk\t'VMware\'s; this and all below by qemu-nbd'
vdi\t'VirtualBox\'s'
vhdx\t'Hyper-V\'s'
vpc\t'Virtual PC\'s, VHD'
qed\t'QEMU\'s former enhanced disk'
parallels\t'Parallels\''
luks\t'An encrypted raw disk; needs --secret'
qcow2-luks\t'An encrypted qcow2; needs --secret'
dmg\t'Apple\'s; only as a source'
cloop\t'A compressed loop device; only as a source'
bochs\t'Bochs\'; only as a source'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l mode -d 'A new image, or one that is there; a device is written in place' -r -f -a "absolute-paths\t'Make a new image beside the target and put it in the target\'s place when it is complete; a device is written in place'
existing\t'Write into the image that is there, in place'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l speed -d 'Limit in bytes a second, such as 50M; holes are not charged' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l workers -d 'Number of copying threads; by default one for each core' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l on-source-error -d 'What a read error of the image does' -r -f -a "report\t'End with the error'
ignore\t'Go on: an unreadable source range becomes zeroes, an unwritable target range is skipped; exit status 3'
enospc\t'Stop when the target is full, else report'
stop\t'Pause, and try again after Enter on the terminal or SIGCONT'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l on-target-error -d 'What a write error of the target does' -r -f -a "report\t'End with the error'
ignore\t'Go on: an unreadable source range becomes zeroes, an unwritable target range is skipped; exit status 3'
enospc\t'Stop when the target is full, else report'
stop\t'Pause, and try again after Enter on the terminal or SIGCONT'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l hook-before -d 'A shell command that runs before a disk is opened; exit status 9 if it fails' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l hook-after -d 'One that runs when the copy is complete and both ends are closed; if it fails the copy stays, and the exit status is 9' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l hook-failed -d 'One that runs when there is no copy, both ends closed' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l hook-timeout -d 'In which time each of these must end' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l progress -d 'How progress is shown on standard error' -r -f -a "auto\t'A bar on a terminal, plain lines under systemd\'s journal, else none'
bar\t'A bar; plain lines where standard error is no terminal'
plain\t'A line every 30 seconds and one at the end'
none\t'None'"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l progress-interval -d 'Time between JSON status records (1 by default) and between plain lines (30 by default)' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l only-changed -d 'Read the target first, and write only what differs: onto a device, or with --mode existing'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l verify -d 'Read the target back from its medium, and compare it with what was written; a difference is exit status 7'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l dry-run -d 'Open, lock and check everything, say what the restore would take, and stop before its first byte'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l no-fsync -d 'Do not flush the target; a success then promises nothing about a power cut'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l direct -d 'Bypass the page cache'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -l json -d 'Write JSON lines to standard output; to standard error where the copy goes to standard output'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -s q -l quiet -d 'Only errors: no progress, no warnings'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -s v -l verbose -d 'Also say what was found and done, on success too'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand restore" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -l qmp -d 'The socket that was given to --qmp; by default all runs and servers of this user are found' -r -F
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -l job -d 'Which job: its id, or the path of the disk that it copies; may be left out where there is one' -r
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -l writer-dir -d 'Where runs are found: what they were given as --writer-dir' -r -f -a "(__fish_complete_directories)"
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -s h -l help -d 'Print help'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -f -a "status" -d 'Show jobs: a line each'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -f -a "speed" -d 'Set the limit in bytes a second, such as 50M; 0, off and unlimited mean none'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -f -a "pause" -d 'Stand still; writers are served on'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -f -a "resume" -d 'Go on, after a pause as after an error'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -f -a "cancel" -d 'End the job, and remove what it made'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and not __fish_seen_subcommand_from status speed pause resume cancel watch" -f -a "watch" -d 'Show progress until all jobs are over'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and __fish_seen_subcommand_from status" -l json -d 'As JSON: the list that query-block-jobs returns'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and __fish_seen_subcommand_from status" -s h -l help -d 'Print help'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and __fish_seen_subcommand_from speed" -s h -l help -d 'Print help'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and __fish_seen_subcommand_from pause" -s h -l help -d 'Print help'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and __fish_seen_subcommand_from resume" -s h -l help -d 'Print help'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and __fish_seen_subcommand_from cancel" -s h -l help -d 'Print help'
complete -c drive-backup -n "__fish_drive_backup_using_subcommand ctl; and __fish_seen_subcommand_from watch" -s h -l help -d 'Print help'
