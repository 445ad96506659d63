"""Table E.1-1 of PS3.15 (2026c): what the Basic Application Level Confidentiality Profile does with each attribute.

Facts of the standard, by keyword, and which ones its options keep. How an action is done is in confidentiality.
"""

from __future__ import annotations

# X: remove, Z: empty, D: a value that says nothing, U: another UID; with a stroke: by what the object's type demands
_TABLE = {
    "D": """
        ContextGroupVersion ContextGroupLocalVersion ClinicalTrialSponsorName ClinicalTrialProtocolID
        ClinicalTrialSubjectID ClinicalTrialSubjectReadingID ClinicalTrialProtocolEthicsCommitteeName
        AcquisitionFieldOfViewLabel FrameAcquisitionDateTime FrameReferenceDateTime XRaySourceID SourceStartDateTime
        SourceEndDateTime XRayDetectorID FunctionalSyncPulse DecayCorrectionDateTime ExclusionStartDateTime
        FlowIdentifierSequence FlowIdentifier SourceIdentifier FrameOriginTimestamp ImpedanceMeasurementDateTime
        ContainerIdentifier SpecimenIdentifier PersonIdentificationCodeSequence VerifyingOrganization
        VerificationDateTime VerifyingObserverSequence VerifyingObserverName DateTime Date Time PersonName
        ReferencedDateTime ContentSequence EncapsulatedDocument AssertionDateTime EffectiveDateTime
        InformationIssueDateTime AnnotationGroupUID AnnotationGroupLabel GraphicAnnotationSequence
        UnformattedTextValue HangingProtocolCreationDateTime SelectorAEValue SelectorASValue SelectorDAValue
        SelectorDTValue SelectorOBValue SelectorLOValue SelectorLTValue SelectorPNValue SelectorTMValue
        SelectorSHValue SelectorUNValue SelectorSTValue SelectorUTValue SelectorURValue DigitalSignatureDateTime
        CertificateOfSigner AttributeModificationDateTime ModifyingSystem ReasonForTheAttributeModification
        DestinationAE StructureSetLabel TreatmentControlPointDate TreatmentControlPointTime SafePositionExitDate
        SafePositionExitTime SafePositionReturnDate SafePositionReturnTime RTPlanLabel SourceStrengthReferenceDate
        SourceStrengthReferenceTime TreatmentPositionGroupLabel RadiationDoseIdentificationLabel
        RadiationDoseInVivoMeasurementLabel RTToleranceSetLabel RadiationGenerationModeLabel
        TreatmentToleranceViolationDescription TreatmentToleranceViolationDateTime RecordedRTControlPointDateTime
        InterlockDateTime InterlockDescription OverrideDateTime InterlockOriginDescription BeamHoldTransitionDateTime
        DeviceLabel UserContentLabel UserContentLongLabel EntityLabel EntityLongLabel RTPrescriptionLabel
    """,
    "Z": """
        StudyDate StudyTime AccessionNumber ReferringPhysicianName ConsultingPhysicianName PatientName
        PatientBirthDate PatientSex ClinicalTrialProtocolName ClinicalTrialSiteID ClinicalTrialSiteName
        ClinicalTrialTimePointID ClinicalTrialCoordinatingCenterName CalibrationDateTime StudyID
        IssuerOfTheContainerIdentifierSequence IssuerOfTheSpecimenIdentifierSequence SpecimenPreparationSequence
        PlacerOrderNumberImagingServiceRequest FillerOrderNumberImagingServiceRequest ParticipationDateTime
        VerifyingObserverIdentificationCodeSequence SourceOfPreviousValues StructureSetDate StructureSetTime ROIName
        ROIInterpreter RTAccessoryHolderSlotID RTAccessoryDeviceSlotID RadiationGenerationModeDescription ReviewDate
        ReviewTime ConceptualVolumeCombinationDescription ConceptualVolumeDescription DeviceAlternateIdentifier
        ManufacturerDeviceIdentifier RTPhysicianIntentNarrative ReasonForSuperseding TreatmentTechniqueNotes
        PrescriptionNotes FractionationNotes PrescriptionNotesSequence
    """,
    "Z/D": """
        ContentDate ContentTime PatientID ContrastBolusAgent InstructionPerformedDateTime ContentCreatorName
    """,
    "X/Z": """
        AcquisitionDate AcquisitionTime ReferencedStudySequence PatientSexNeutered RequestedProcedureDescription
        AcquisitionContextSequence LabelText BarcodeValue SourceSerialNumber TreatmentMachineName ReviewerName
    """,
    "X/D": """
        InstanceCreationDate SeriesDate SeriesTime OperatorIdentificationSequence ProtocolName
        AcquisitionDeviceProcessingDescription DetectorID DateOfLastDetectorCalibration TimeOfLastDetectorCalibration
        StartAcquisitionDateTime EndAcquisitionDateTime ObservationDateTime WaveformAnnotationSequence
        FirstTreatmentDate MostRecentTreatmentDate TreatmentDate TreatmentTime RTPlanDate RTPlanTime
        IntendedPhaseStartDate IntendedPhaseEndDate RTTreatmentApproachLabel TreatmentSite
    """,
    "X/Z/D": """
        InstanceCreationTime AcquisitionDateTime InstitutionName InstitutionCodeSequence StationName OperatorsName
        ReferencedPerformedProcedureStepSequence DeviceSerialNumber
    """,
    "X/Z/U*": """
        ReferencedImageSequence SourceImageSequence
    """,
    "U": """
        RequestedSOPInstanceUID MediaStorageSOPInstanceUID ReferencedSOPInstanceUIDInFile InstanceCreatorUID
        AcquisitionUID SOPInstanceUID PyramidUID FailedSOPInstanceUIDList ReferencedSOPInstanceUID TransactionUID
        IrradiationEventUID DeviceUID ManufacturerDeviceClassUID TargetUID StudyInstanceUID SeriesInstanceUID
        FrameOfReferenceUID SynchronizationFrameOfReferenceUID ConcatenationUID DimensionOrganizationUID
        PaletteColorLookupTableUID LargePaletteColorLookupTableUID MultiplexGroupUID SpecimenUID
        ReferencedGeneralPurposeScheduledProcedureStepTransactionUID UID ObservationUID ReferencedObservationUIDTrial
        ObservationSubjectUIDTrial TemplateExtensionOrganizationUID TemplateExtensionCreatorUID TrackingUID
        SourceFrameOfReferenceUID FiducialUID PresentationDisplayCollectionUID PresentationSequenceCollectionUID
        StorageMediaFileSetUID DigitalSignatureUID ReferencedFrameOfReferenceUID RelatedFrameOfReferenceUID
        DoseReferenceUID TableTopPositionAlignmentUID ReferencedDoseReferenceUID TreatmentPositionGroupUID
        PatientSetupUID TreatmentSessionUID ReferencedTreatmentPositionGroupUID ConceptualVolumeUID
        ReferencedConceptualVolumeUID ConstituentConceptualVolumeUID SourceConceptualVolumeUID ReferencedFiducialsUID
        RTTreatmentPhaseUID DosimetricObjectiveUID ReferencedDosimetricObjectiveUID
    """,
    "X": """
        AffectedSOPInstanceUID InstanceCoercionDateTime OverlayDate CurveDate OverlayTime CurveTime RetrieveAETitle
        StationAETitle InstitutionAddress ReferringPhysicianAddress ReferringPhysicianTelephoneNumbers
        ReferringPhysicianIdentificationSequence ConsultingPhysicianIdentificationSequence TimezoneOffsetFromUTC
        NetworkID StudyDescription SeriesDescription InstitutionalDepartmentName
        InstitutionalDepartmentTypeCodeSequence PhysiciansOfRecord PhysiciansOfRecordIdentificationSequence
        PerformingPhysicianName PerformingPhysicianIdentificationSequence NameOfPhysiciansReadingStudy
        PhysiciansReadingStudyIdentificationSequence AdmittingDiagnosesDescription AdmittingDiagnosesCodeSequence
        PyramidDescription ReferencedPatientSequence DerivationDescription IdentifyingComments IssuerOfPatientID
        PatientBirthTime PatientInsurancePlanCodeSequence PatientPrimaryLanguageCodeSequence
        PatientPrimaryLanguageModifierCodeSequence OtherPatientIDs OtherPatientNames OtherPatientIDsSequence
        PatientBirthName PatientAge PatientSize PatientWeight PatientAddress InsurancePlanIdentification
        PatientMotherBirthName MilitaryRank BranchOfService MedicalRecordLocator ReferencedPatientPhotoSequence
        MedicalAlerts Allergies CountryOfResidence RegionOfResidence PatientTelephoneNumbers PatientTelecomInformation
        EthnicGroup EthnicGroupCodeSequence Occupation SmokingStatus AdditionalPatientHistory PregnancyStatus
        LastMenstrualDate PatientReligiousPreference ResponsiblePerson ResponsibleOrganization PatientComments
        IssuerOfClinicalTrialProtocolID OtherClinicalTrialProtocolIDsSequence IssuerOfClinicalTrialSiteID
        IssuerOfClinicalTrialSubjectID IssuerOfClinicalTrialSubjectReadingID ClinicalTrialTimePointDescription
        IssuerOfClinicalTrialTimePointID ClinicalTrialSeriesID ClinicalTrialSeriesDescription
        IssuerOfClinicalTrialSeriesID ClinicalTrialProtocolEthicsCommitteeApprovalNumber
        EthicsCommitteeApprovalEffectivenessStartDate EthicsCommitteeApprovalEffectivenessEndDate CalibrationTime
        CalibrationDate MakerNote DeviceSettingDescription CameraOwnerName LensSpecification LensMake LensModel
        LensSerialNumber GPSVersionID GPSLatitudeRef GPSLatitude GPSLongitudeRef GPSLongitude GPSAltitudeRef
        GPSAltitude GPSTimeStamp GPSSatellites GPSStatus GPSMeasureMode GPSDOP GPSSpeedRef GPSSpeed GPSTrackRef
        GPSTrack GPSImgDirectionRef GPSImgDirection GPSMapDatum GPSDestLatitudeRef GPSDestLatitude GPSDestLongitudeRef
        GPSDestLongitude GPSDestBearingRef GPSDestBearing GPSDestDistanceRef GPSDestDistance GPSProcessingMethod
        GPSAreaInformation GPSDateStamp GPSDifferential InterventionDrugStopTime InterventionDrugStartTime PlateID
        GeneratorID CassetteID GantryID UniqueDeviceIdentifier UDISequence SecondaryCaptureDeviceID
        HardcopyCreationDeviceID DateOfSecondaryCapture TimeOfSecondaryCapture ContrastBolusStartTime
        ContrastBolusStopTime RadiopharmaceuticalStartTime RadiopharmaceuticalStopTime
        RadiopharmaceuticalStartDateTime RadiopharmaceuticalStopDateTime DateOfLastCalibration TimeOfLastCalibration
        DateTimeOfLastCalibration DateOfManufacture DateOfInstallation AcquisitionComments
        TransducerIdentificationSequence RespiratoryMotionCompensationTechniqueDescription XRayDetectorLabel
        MultienergyAcquisitionDescription DecompositionDescription AcquisitionProtocolDescription
        RequestedSeriesDescription ContributionDateTime ContributionDescription PyramidLabel ModifyingDeviceID
        ModifiedImageDate ModifiedImageTime ModifiedImageDescription ImageComments FrameComments
        ImagePresentationComments StudyIDIssuer StudyVerifiedDate StudyVerifiedTime StudyReadDate StudyReadTime
        ScheduledStudyStartDate ScheduledStudyStartTime ScheduledStudyStopDate ScheduledStudyStopTime
        ScheduledStudyLocation ScheduledStudyLocationAETitle ReasonForStudy RequestingPhysician RequestingService
        StudyArrivalDate StudyArrivalTime StudyCompletionDate StudyCompletionTime ReasonForVisit
        ReasonForVisitCodeSequence RequestedContrastAgent StudyComments ReferencedPatientAliasSequence AdmissionID
        IssuerOfAdmissionID IssuerOfAdmissionIDSequence ScheduledAdmissionDate ScheduledAdmissionTime
        ScheduledDischargeDate ScheduledDischargeTime ScheduledPatientInstitutionResidence AdmittingDate AdmittingTime
        DischargeDate DischargeTime DischargeDiagnosisDescription SpecialNeeds ServiceEpisodeID
        IssuerOfServiceEpisodeID ServiceEpisodeDescription IssuerOfServiceEpisodeIDSequence CurrentPatientLocation
        PatientInstitutionResidence PatientState VisitComments MultiplexGroupLabel ChannelLabel
        ChannelDerivationDescription WaveformFilterDescription FilterLookupTableDescription ScheduledStationAETitle
        ScheduledProcedureStepStartDate ScheduledProcedureStepStartTime ScheduledProcedureStepEndDate
        ScheduledProcedureStepEndTime ScheduledPerformingPhysicianName ScheduledProcedureStepDescription
        ScheduledProcedureStepID ScheduledPerformingPhysicianIdentificationSequence ScheduledStationName
        ScheduledProcedureStepLocation PreMedication PerformedStationAETitle PerformedStationName PerformedLocation
        PerformedProcedureStepStartDate PerformedProcedureStepStartTime PerformedProcedureStepEndDate
        PerformedProcedureStepEndTime PerformedProcedureStepID PerformedProcedureStepDescription
        RequestAttributesSequence CommentsOnThePerformedProcedureStep CommentsOnRadiationDose SpecimenAccessionNumber
        ContainerDescription AcquisitionContextDescription SpecimenShortDescription SpecimenDetailedDescription
        SlideIdentifier RequestedProcedureID ReasonForTheRequestedProcedure PatientTransportArrangements
        RequestedProcedureLocation ReasonForRequestedProcedureCodeSequence NamesOfIntendedRecipientsOfResults
        IntendedRecipientsOfResultsIdentificationSequence PersonAddress PersonTelephoneNumbers
        PersonTelecomInformation RequestedProcedureComments ReasonForTheImagingServiceRequest
        IssueDateOfImagingServiceRequest IssueTimeOfImagingServiceRequest OrderEnteredBy OrderEntererLocation
        OrderCallbackPhoneNumber OrderCallbackTelecomInformation ImagingServiceRequestComments
        ConfidentialityConstraintOnPatientDataDescription ScheduledProcedureStepStartDateTime
        ScheduledProcedureStepExpirationDateTime ScheduledProcedureStepModificationDateTime ExpectedCompletionDateTime
        ScheduledStationNameCodeSequence ScheduledStationGeographicLocationCodeSequence
        PerformedStationNameCodeSequence PerformedStationGeographicLocationCodeSequence
        ScheduledHumanPerformersSequence ActualHumanPerformersSequence HumanPerformerOrganization HumanPerformerName
        PerformedProcedureStepStartDateTime PerformedProcedureStepEndDateTime ProcedureStepCancellationDateTime
        FindingsGroupRecordingDateTrial FindingsGroupRecordingTimeTrial ObservationStartDateTime
        AuthorObserverSequence ParticipantSequence CustodialOrganizationSequence
        DateOfDocumentOrVerbalTransactionTrial TimeOfDocumentCreationOrVerbalTransactionTrial ObservationDateTrial
        ObservationTimeTrial CurrentObserverTrial VerbalSourceTrial AddressTrial TelephoneNumberTrial
        VerbalSourceIdentifierCodeSequenceTrial TemplateVersion TemplateLocalVersion HL7DocumentEffectiveTime
        ApprovalStatusDateTime ProductExpirationDateTime SubstanceAdministrationDateTime AssertionExpirationDateTime
        ContainerComponentID DeviceDescription LongDeviceDescription AnnotationGroupDescription
        PresentationCreationDate PresentationCreationTime ContentCreatorIdentificationCodeSequence ReceivingAE
        RequestingAE IconImageSequence TopicTitle TopicSubject TopicAuthor TopicKeywords SOPAuthorizationDateTime
        CertifiedTimestamp ReferencedDigitalSignatureSequence ReferencedSOPInstanceMACSequence MAC
        ModifiedAttributesSequence NonconformingModifiedAttributesSequence NonconformingDataElementValue
        OriginalAttributesSequence InstanceOriginStatus TextString CreationDate CreationTime Originator
        PositionAcquisitionTemplateName PositionAcquisitionTemplateDescription StructureSetName
        StructureSetDescription ROIDescription ROIDateTime ROIObservationDateTime ROIGenerationDescription
        ROICreatorSequence ROIInterpreterSequence ROIObservationLabel ROIObservationDescription RTPlanName
        RTPlanDescription TreatmentSites PrescriptionDescription DoseReferenceDescription FractionGroupDescription
        BeamDescription BolusDescription FixationDeviceDescription ShieldingDeviceDescription
        SetupTechniqueDescription SourceManufacturer CompensatorDescription EquipmentFrameOfReferenceDescription
        PatientTreatmentPreparationProcedureParameterDescription PatientTreatmentPreparationMethodDescription
        PatientSetupPhotoDescription DisplacementReferenceLabel ReasonForOmissionDescription EntityName
        EntityDescription PriorTreatmentDoseDescription IntendedFractionStartTime Arbitrary TextComments ResultsID
        ResultsIDIssuer InterpretationRecordedDate InterpretationRecordedTime InterpretationRecorder
        InterpretationTranscriptionDate InterpretationTranscriptionTime InterpretationTranscriber InterpretationText
        InterpretationAuthor InterpretationApproverSequence InterpretationApprovalDate InterpretationApprovalTime
        PhysicianApprovingInterpretation InterpretationDiagnosisDescription ResultsDistributionListSequence
        DistributionName DistributionAddress InterpretationID InterpretationIDIssuer Impressions ResultsComments
        DigitalSignaturesSequence DataSetTrailingPadding
    """,
}
ACTIONS = {keyword: code for code, keywords in _TABLE.items() for keyword in keywords.split()}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ---- what the options keep

OF_PATIENTS = _words("PatientSex PatientAge PatientSize PatientWeight")
OF_DEVICES = _words("""
    CassetteID DetectorID DeviceDescription DeviceLabel DeviceSerialNumber DeviceUID GantryID GeneratorID
    ManufacturerDeviceClassUID ManufacturerDeviceIdentifier PlateID ScheduledStationName StationName UDISequence
    UniqueDeviceIdentifier XRayDetectorID XRaySourceID
    """)
# of a person's life, not of an examination: no shift hides them
NEVER_SHIFTED = _words("""
    PatientBirthDate PatientBirthTime
    DateOfManufacture DateOfInstallation ContextGroupVersion ContextGroupLocalVersion HangingProtocolCreationDateTime
    """)

# ---- what the table does not name

# free text, addresses and bulk that nothing needs: more is removed than the standard asks for
UNLISTED_REMOVED = _words("AE DA DT TM PN LT ST UT UC UR UN OB OD OF OL OV OW")
# short texts of which only those stay that a machine or a coding scheme writes: comments, labels, orders, places go
TECHNICAL_TEXT = _words("""
    Manufacturer ManufacturerModelName ManufacturerRelatedModelGroup SoftwareVersions CodeValue ExtendedCodeValue
    CodeMeaning CodingSchemeDesignator CodingSchemeVersion CodingSchemeRegistry MappingResourceName StageName ViewName
    SequenceName PulseSequenceName Radionuclide Radiopharmaceutical RadiopharmaceuticalRoute ImagedNucleus
    ContrastBolusRoute TriggerSourceOrType CardiacFramingType PVCRejection FilterType TypeOfFilters CollimatorGridName
    PaddleDescription AcquisitionMode DoseModeName ConvolutionKernel ReceiveCoilName TransmitCoilName PlateType
    PhosphorType AcquisitionDeviceProcessingCode OutputPower TransducerData ProcessingFunction PostprocessingFunction
    DetectorManufacturerName DetectorManufacturerModelName ReceiveCoilManufacturerName TransmitCoilManufacturerName
    MultiCoilConfiguration MultiCoilElementName RespiratorySignalSourceID ImageFilter ApplicationName
    ApplicationVersion ApplicationManufacturer PositionReferenceIndicator StackID ImageGeometryType
    DimensionDescriptionLabel RescaleType ModalityLUTType LUTExplanation LUTLabel WindowCenterWidthExplanation
    EnergyWindowName AttenuationCorrectionMethod ReconstructionMethod ScatterCorrectionMethod
    DetectorLinesOfResponseUsed SegmentLabel SegmentAlgorithmName AlgorithmName AlgorithmVersion
    OpticalPathIdentifier ReferencedOpticalPathIdentifier SecondaryCaptureDeviceManufacturer
    SecondaryCaptureDeviceManufacturerModelName SecondaryCaptureDeviceSoftwareVersions
    """)
BULK = _words("""
    PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths LUTData
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
    AlphaPaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData
    SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData
    """)
# the meaning of pixels: a file whose values of these cannot be kept is refused
ESSENTIAL = _words("""
    SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType
    SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns BitsAllocated BitsStored
    HighBit PixelRepresentation PixelData FloatPixelData DoubleFloatPixelData ImagePositionPatient
    ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices RescaleSlope RescaleIntercept
    ModalityLUTSequence SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PlanePositionSequence
    PlaneOrientationSequence PixelMeasuresSequence PixelValueTransformationSequence SegmentSequence SegmentNumber
    SegmentIdentificationSequence ReferencedSegmentNumber ContourData ROIContourSequence StructureSetROISequence
    DoseGridScaling GridFrameOffsetVector
    """)
