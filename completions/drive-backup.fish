complete -c drive-backup -l device -d 'The disk image or block device to copy; give it again, with a --target each, for several disks at one instant' -r -F
complete -c drive-backup -l source-format -d 'Its format; by default its content tells' -r -f -a "raw\t'The disk\'s bytes and nothing else'
qcow2\t'QEMU\'s image format, versions 2 and 3; written as 3'"
complete -c drive-backup -l target -d 'The file or block device to write, or - for a raw stream to standard output' -r -F
complete -c drive-backup -l format -d 'The target\'s format' -r -f -a "raw\t'The disk\'s bytes and nothing else'
qcow2\t'QEMU\'s image format, versions 2 and 3; written as 3'"
complete -c drive-backup -l mode -d 'A new image, or one that is there' -r -f -a "absolute-paths\t'Make a new image beside the target and put it in the target\'s place when it is complete; a device is written in place'
existing\t'Write into the image that is there, in place'"
complete -c drive-backup -l cluster-size -d 'Cluster size of a new qcow2: a power of two from 512 to 2M; 64K by default' -r
complete -c drive-backup -l compress -d 'Compress a new qcow2: zlib or zstd; with a level, 1 to 9 or 1 to 22, as in zstd:9' -r
complete -c drive-backup -l sparse -d 'Turn runs of zero bytes into holes' -r -f -a "auto\t'Wherever the target can have holes'
never\t'Write every byte'"
complete -c drive-backup -l speed -d 'Limit in bytes a second, such as 50M; 0, off and unlimited mean none' -r
complete -c drive-backup -l workers -d 'Number of copying threads; by default one for each core' -r
complete -c drive-backup -l writer -d 'Whether a cooperating writer takes part' -r -f -a "auto\t'If there is one'
required\t'Without one the backup does not start'
none\t'Nobody is looked for'"
complete -c drive-backup -l writer-dir -d 'Where writers and backups find each other' -r -f -a "(__fish_complete_directories)"
complete -c drive-backup -l snapshot -d 'What keeps the instant' -r -f -a "auto\t'A clone where the file system can, else the overlay'
overlay\t'The overlay: what writers are about to overwrite is saved first'
reflink\t'A clone of the file system, or the backup does not start'"
complete -c drive-backup -l overlay -d 'Folder for what writers are about to overwrite, or memory; by default TMPDIR, else /var/tmp' -r -f -a "(__fish_complete_directories)"
complete -c drive-backup -l overlay-limit -d 'The most that the overlay may hold; 0, off and unlimited mean no limit' -r
complete -c drive-backup -l freeze-timeout -d 'In how many seconds all writers must be frozen' -r
complete -c drive-backup -l cbw-timeout -d 'In how many seconds the old contents must be saved for a waiting write' -r
complete -c drive-backup -l on-cbw-error -d 'What happens when they can\'t be' -r -f -a "break-snapshot\t'The write goes on, the backup fails: exit status 6'
break-guest-write\t'The write fails, the backup goes on'"
complete -c drive-backup -l on-source-error -d 'What a read error of the source does' -r -f -a "report\t'End with the error'
ignore\t'Go on: an unreadable source range becomes zeroes, an unwritable target range is skipped; exit status 3'
enospc\t'Stop when the target is full, else report'
stop\t'Pause, and try again after Enter on the terminal or SIGCONT'"
complete -c drive-backup -l on-target-error -d 'What a write error of the target does' -r -f -a "report\t'End with the error'
ignore\t'Go on: an unreadable source range becomes zeroes, an unwritable target range is skipped; exit status 3'
enospc\t'Stop when the target is full, else report'
stop\t'Pause, and try again after Enter on the terminal or SIGCONT'"
complete -c drive-backup -l progress -d 'How progress is shown on standard error' -r -f -a "auto\t'A bar on a terminal, plain lines under systemd\'s journal, else none'
bar\t'A bar; plain lines where standard error is no terminal'
plain\t'A line every 30 seconds and one at the end'
none\t'None'"
complete -c drive-backup -l progress-interval -d 'Time between JSON status records (1 by default) and between plain lines (30 by default)' -r
complete -c drive-backup -l no-backing -d 'Refuse a source that has a backing file'
complete -c drive-backup -l allow-inconsistent -d 'Accept a source that changes while it is copied; the copy may then be torn, and the summary says so'
complete -c drive-backup -l no-fsync -d 'Do not flush the target; a success then promises nothing about a power cut'
complete -c drive-backup -l direct -d 'Bypass the page cache'
complete -c drive-backup -l json -d 'Write JSON lines to standard output, to standard error with --target -'
complete -c drive-backup -s q -l quiet -d 'Only errors: no progress, no warnings'
complete -c drive-backup -s v -l verbose -d 'Also say what was found and done, on success too'
complete -c drive-backup -s h -l help -d 'Print help (see more with \'--help\')'
complete -c drive-backup -s V -l version -d 'Print version'
